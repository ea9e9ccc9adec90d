"""Processes that Ray gave a GPU on which TensorFlow cannot compute.

Ray is told of GPUs that do not exist, as on a host whose TensorFlow lacks the CUDA libraries. No GPU is needed, and the
tests hide one that is there.
"""

import _ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from image_models import IMAGE_SHAPE, save_model
from session_processes import kill_cluster

from perceiver import processor
from pipeline import devices
from pipeline.devices import (
    GpuError,
    best_precision,
    communication_options,
    multiply_on_gpu,
    require_gpu,
    set_up_tensorflow,
    used_device,
    used_gpus,
)
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import Worker
from pipeline.workers import in_process

ROOT = Path(__file__).parents[1]
SEES_NONE = r"use.gpu: Ray gave a process on \S+ the GPU .* TensorFlow \S+, built .*, sees none there; NVIDIA's"
RUN = ("pipeline/run.py", "quickstart", "--train.num-workers", "1", "--storage")


@pytest.fixture(scope="module")
def cluster(ray_folder: Path) -> Iterator[str]:
    """Address of a cluster with two logical GPUs. The ids are of no GPU, also on a machine that has some."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "97,98", "RAY_TMPDIR": str(ray_folder)}
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--head", "--block", "--port=0", "--num-cpus=2", "--num-gpus=2", "--include-dashboard=false"]
    with (ray_folder / "head.log").open("w+") as log:
        command = [ray, "start", *options, f"--temp-dir={ray_folder}"]
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 60
            while not (found := re.search(r"--address='(\S+)'", (ray_folder / "head.log").read_text())):
                assert head.poll() is None, (ray_folder / "head.log").read_text()
                assert time.monotonic() < deadline, "ray start does not answer"
                time.sleep(0.2)
            yield found[1]
        finally:
            kill_cluster(ray_folder)
            head.wait()


def run(address: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a command of the project in the cluster; returns its exit code and what it printed, lines joined."""
    environment = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())


@pytest.mark.slow
def test_the_tests_of_gpus_would_run() -> None:
    """On CPUs, in a process of its own: what they compare is then equal, and none of them fails."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/gpu"]
    environment = os.environ | {"PERCEIVER_REHEARSE_GPU_TESTS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_the_tests_of_gpus_are_skipped_with_the_reason_where_there_is_none() -> None:
    if devices.driver_is_loaded():
        pytest.skip("this machine has NVIDIA's driver")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "no GPU: NVIDIA's driver is not loaded" in done.stdout
    assert re.fullmatch(r"\d+ skipped in .*", done.stdout.splitlines()[-1]), done.stdout


def test_the_message_names_what_is_there_and_the_remedy() -> None:
    with pytest.raises(GpuError, match=rf"^train\.{SEES_NONE} .*: .*--train\.no-use-gpu$"):
        require_gpu("train.use_gpu")
    does_not = r"^use_gpu: the GPU of a process on \S+ does not multiply matrices: .*CPU:0 gave 64.*--no-use-gpu$"
    with pytest.raises(GpuError, match=does_not):
        multiply_on_gpu("use_gpu")


def test_cusolver_is_loaded_from_nvidias_package(tmp_path: Path) -> None:
    """Another library stands in for it, since the tests need no GPU and so none of NVIDIA's packages."""
    library = tmp_path / "nvidia/cusolver/lib/libcusolver.so.11"
    library.parent.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, library)
    (library.parent / "libcusolver.so.12").write_text("not a library")
    command = "from pipeline.devices import load_cusolver as load; load(); print(open('/proc/self/maps').read())"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(library) in done.stdout


@pytest.mark.parametrize("trials", ["0", "2"])
def test_a_run_ends_before_anything_is_started(cluster: str, tmp_path: Path, trials: str) -> None:
    start = time.monotonic()
    code, _, errors = run(cluster, *RUN, str(tmp_path), "--train.use-gpu", "--search.num-trials", trials)
    assert code == 1, errors
    assert re.search(f"^error: train.{SEES_NONE}", errors)
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("tasks/*/*/manifest.json")), "a task is recorded as done"
    assert time.monotonic() - start < 60


def test_gpus_that_nobody_asked_for_are_mentioned(cluster: str, tmp_path: Path) -> None:
    code, output, errors = run(cluster, *RUN, str(tmp_path), "--until", "ingest")
    assert code == 0, errors
    assert "the cluster has 2 GPUs, and this run computes on CPUs: --train.use-gpu" in output


def predict(folder: Path) -> tuple[str, ...]:
    """A command that classifies three images, with a model of its own."""
    if not (folder / "model").exists():
        save_model(folder / "model")
        np.savez(folder / "images.npz", images=np.zeros((3, *IMAGE_SHAPE), np.uint8))
    names = ("model", "images.npz", "results")
    return ("-m", "pipeline.predict", *(str(folder / name) for name in names), "--trust", "--num-actors", "1")


def test_predict_ends_before_an_image_is_classified(cluster: str, tmp_path: Path) -> None:
    command = predict(tmp_path)
    start = time.monotonic()
    code, _, errors = run(cluster, *command, "--use-gpu")
    assert code == 1, errors
    assert re.search(f"^error: {SEES_NONE}", errors)
    assert "--no-use-gpu" in errors
    assert "Traceback" not in errors
    assert time.monotonic() - start < 60
    assert not list((tmp_path / "results").glob("*.parquet")), "results were written"
    assert not (tmp_path / "results/_done.json").exists()


def test_an_actor_with_a_gpu_checks_it_itself(cluster: str, tmp_path: Path) -> None:
    """Where the check before it finds no free GPU in time; Ray Data also has rules of its own for actors with GPUs."""
    without_check = (
        "from pipeline import predict; from pipeline.inference import job; "
        "job.require_gpu_in_cluster = lambda option: None; predict.end(predict.main())"
    )
    code, _, errors = run(cluster, "-c", without_check, *predict(tmp_path)[2:], "--use-gpu")
    assert code == 1, errors
    assert re.search(rf"(^|\.log )error: {SEES_NONE}", errors), errors
    assert "Traceback" not in errors


def test_predict_mentions_gpus_that_nobody_asked_for_and_names_what_it_used(cluster: str, tmp_path: Path) -> None:
    code, output, errors = run(cluster, *predict(tmp_path))
    assert code == 0, errors
    assert "the cluster has 2 GPUs, and this run computes on CPUs: --use-gpu" in output
    assert f"classified on {used_device()}" in output


@pytest.mark.slow
def test_a_run_on_cpus_of_a_cluster_with_gpus_records_no_gpu(cluster: str, tmp_path: Path) -> None:
    short = ("--train.epochs", "1", "--search.num-trials", "0", "--until", "train")
    code, _, errors = run(cluster, *RUN, str(tmp_path), *short)
    assert code == 0, errors
    (manifest,) = tmp_path.glob("tasks/train/*/manifest.json")
    output = json.loads(manifest.read_text())["output"]
    assert output["device"] == used_device()
    assert output["gpus_per_worker"] == 0
    assert [epoch["num_gpus"] for epoch in output["history"]] == [0]


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((3, 5), "float32"),  # Kepler
        ((6, 1), "float32"),  # Pascal
        ((7, 0), "mixed_float16"),  # Volta
        ((7, 5), "mixed_float16"),  # Turing
        ((8, 0), "mixed_bfloat16"),  # Ampere
        ((8, 9), "mixed_bfloat16"),  # Ada
        ((9, 0), "mixed_bfloat16"),  # Hopper
        ((10, 0), "mixed_bfloat16"),  # Blackwell
        ((12, 0), "mixed_bfloat16"),
    ],
)
def test_the_precision_follows_from_the_compute_capability(capability: tuple[int, int], precision: str) -> None:
    assert best_precision(capability) == precision


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [
        ("mixed_bfloat16", (7, 0), "train.precision = mixed_bfloat16 is slow on V100, .* 7.0: .* mixed_float16 suits"),
        ("mixed_float16", (6, 1), "mixed_float16 is slow on V100, .* 6.1: --train.precision float32 suits it"),
        ("mixed_float16", (9, 0), "^$"),
        ("mixed_bfloat16", (8, 0), "^$"),
        ("float32", (9, 0), "^$"),
    ],
)
def test_a_precision_that_a_gpu_has_no_units_for_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(devices, "_gpus", lambda: [("V100", capability)])
    assert re.search(expected, devices.precision_advice(precision, use_gpu=True, is_perceiver=True))


@pytest.mark.parametrize(
    ("precision", "machine", "flags", "expected"),
    [
        ("mixed_bfloat16", "x86_64", "fma avx2", "mixed_bfloat16 is slow on A CPU, .* no AVX-512, .* float32 suits it"),
        ("mixed_float16", "x86_64", "fma avx2", "mixed_float16 is slow on A CPU"),
        ("float32", "x86_64", "fma avx2", "^$"),
        ("mixed_bfloat16", "x86_64", "fma avx2 avx512f avx512bw", "^$"),
        ("mixed_bfloat16", "x86_64", "fma avx2 avx_vnni avx_ne_convert", "^$"),  # such as Sierra Forest
        ("mixed_bfloat16", "aarch64", "", "^$"),
    ],
)
def test_a_precision_that_a_processor_is_slow_at_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, machine: str, flags: str, expected: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert re.search(expected, devices.precision_advice(precision, use_gpu=False, is_perceiver=False))
    assert not devices.precision_advice(precision, use_gpu=False, is_perceiver=True)


def test_a_worker_says_that_its_processor_is_slow_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    monkeypatch.setattr(devices, "has_bfloat16_kernels", lambda: False)
    monkeypatch.setattr(in_process, "set_up_tensorflow", lambda *_, **__: None)
    monkeypatch.setattr("pipeline.training.fit.fit", lambda *_: happened.append("trained"))
    config = TrainingConfig(precision="mixed_bfloat16")
    worker = Worker(report=lambda metrics, folder: None)
    in_process.train_in_process(OwnModel(print), config, None, None, worker, warn=happened.append)  # type: ignore[arg-type]
    assert [line.partition(" is slow on")[0] for line in happened] == ["train.precision = mixed_bfloat16", "trained"]


def test_workers_on_gpus_sum_with_nccl() -> None:
    kinds = tf.distribute.experimental.CommunicationImplementation
    assert communication_options(use_gpu=True).implementation == kinds.NCCL
    assert communication_options(use_gpu=False).implementation == kinds.AUTO


@pytest.mark.parametrize(("use_gpu", "expected"), [(True, ["first"]), (False, [])])
def test_a_process_uses_one_gpu_and_only_if_it_was_asked_to(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool, expected: list[str]
) -> None:
    said: dict[str, Any] = {"growth": []}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["first", "second"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda found, kind: said.update({kind: found}))
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda each, on: said["growth"].append(each))
    for pool in ("intra", "inter"):  # TensorFlow may run here already
        setter = f"set_{pool}_op_parallelism_threads"
        monkeypatch.setattr(tf.config.threading, setter, lambda number, pool=pool: said.update({pool: number}))
    set_up_tensorflow(2, use_gpu)
    assert said == {"GPU": expected, "growth": expected, "intra": 2, "inter": 2}
    said["growth"] = []
    set_up_tensorflow(2, use_gpu, divides_operations=False)
    assert said == {"GPU": expected, "growth": expected, "intra": 1, "inter": 2}
    assert used_gpus() == 0, "this process has none"


@pytest.mark.parametrize(("given", "left_out"), [("", True), ("--xla_gpu_enable_triton_gemm=true", False)])
def test_xla_on_a_gpu_multiplies_without_triton_unless_it_is_asked_for(
    tmp_path: Path, given: str, left_out: bool
) -> None:
    program = (
        "import tensorflow as tf; from pipeline.devices import set_up_tensorflow; set_up_tensorflow(1, use_gpu=True);"
        "print(tf.function(lambda x: x @ x, jit_compile=True)(tf.ones((4, 4)))[0, 0].numpy())"
    )
    # XLA writes the flags that are not its defaults into this folder, on a CPU too. An unknown flag ends the process.
    flags = f"--xla_dump_to={tmp_path} {given}"
    environment = os.environ | {"XLA_FLAGS": flags, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "4.0\n", f"XLA no longer knows the flag {devices.XLA_TRITON}: {done.stderr[-500:]}"
    used = next(tmp_path.glob("*.debug_options")).read_text()
    assert ("xla_gpu_enable_triton_gemm: false" in used) == left_out


def test_a_file_of_flags_for_xla_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla_flags")
    devices.leave_triton_out()
    assert os.environ["XLA_FLAGS"] == "/etc/xla_flags"
