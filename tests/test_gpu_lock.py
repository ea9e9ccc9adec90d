"""requirements-gpu.txt: agrees with the other lock, and an environment made of it has a TensorFlow for GPUs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.devices import driver_is_loaded

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements-gpu.txt"
IN_THE_NEW_ENVIRONMENT = """
import ctypes
import tensorflow as tf
from pipeline.devices import GpuError, require_gpu
print(tf.__version__, tf.sysconfig.get_build_info()["is_cuda_build"], tf.config.list_physical_devices("GPU"))
try:
    require_gpu("train.use_gpu")
except GpuError as error:
    print(error)
ctypes.CDLL("libcusolver.so.11")  # as TensorFlow looks for it
"""


def pinned(file: Path) -> dict[str, frozenset[str]]:
    """The hashes of each `name==version` of a lock file."""
    found: dict[str, frozenset[str]] = {}
    for block in re.split(r"\n(?=[\w.-]+(?:\[[\w,-]+\])?==)", file.read_text())[1:]:
        name, _, rest = block.partition(" ")
        found[re.sub(r"\[.*\]", "", name)] = frozenset(re.findall(r"--hash=(sha256:[0-9a-f]{64})", rest))
    return found


def test_the_lock_for_gpus_has_what_the_other_has_and_nvidias_libraries() -> None:
    gpu, cpu = pinned(LOCK), pinned(ROOT / "requirements.txt")
    assert all(gpu.values()), "a package has no hash"
    nvidia = {name for name in gpu if name.startswith("nvidia-")}
    assert {name.partition("==")[0] for name in nvidia} >= {
        "nvidia-cublas-cu12",
        "nvidia-cuda-runtime-cu12",
        "nvidia-cudnn-cu12",
        "nvidia-nccl-cu12",
    }
    own = gpu.keys() - nvidia
    # setuptools and wheel are pinned by requirements.txt too, as what builds this project.
    assert own <= cpu.keys(), "a package has another version than in requirements.txt"
    assert all(gpu[name] == cpu[name] for name in own)


def test_the_lock_names_no_package_index() -> None:
    text = LOCK.read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text)
    assert "make lock" in text


def test_the_documentation_names_the_locked_versions() -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    versions = dict(name.split("==") for name in pinned(LOCK))
    for name in ("tensorflow", "nvidia-cudnn-cu12", "nvidia-nccl-cu12", "nvidia-cuda-runtime-cu12"):
        assert versions[name] in text, f"{name} {versions[name]}"


def test_the_lock_is_made_from_the_extra_of_the_project() -> None:
    (wanted,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (locked,) = (name for name in pinned(LOCK) if name.startswith("tensorflow=="))
    minor = re.fullmatch(r"tensorflow\[and-cuda\]~=(\d+\.\d+)\.\d+", wanted)
    assert minor
    assert locked.startswith(f"tensorflow=={minor[1]}.")


@pytest.mark.slow
def test_a_new_environment_has_a_tensorflow_for_gpus_and_the_error_names_the_driver(tmp_path: Path) -> None:
    if driver_is_loaded():
        pytest.skip("this machine has NVIDIA's driver")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "install",
        "--no-cache-dir",
    ]
    subprocess.run([*pip, "--require-hashes", "-r", str(LOCK)], check=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command: list[str | Path] = [python, "-c", IN_THE_NEW_ENVIRONMENT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    first, message = done.stdout.splitlines()
    (version,) = (name.partition("==")[2] for name in pinned(LOCK) if name.startswith("tensorflow=="))
    assert first == f"{version} True []"
    assert re.fullmatch(
        rf"train\.use_gpu: Ray gave a process on \S+ the GPU '0' \(CUDA_VISIBLE_DEVICES\), but TensorFlow {version}, "
        r"built for CUDA [\d.]+, sees none there; NVIDIA's driver is not loaded: install NVIDIA's driver on that host, "
        r"and give containers access to it; or compute on CPUs with --train\.no-use-gpu",
        message,
    )
