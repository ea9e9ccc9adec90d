"""Fixtures of all tests: a hermetic environment, one small Ray cluster, and the CIFAR-100 archive if there is one."""

import gc
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from session_processes import processes_of_this_session

# The tests of GPUs, and no others, get those that this variable names back.
# Kept if it is there, since the workers of pytest-xdist inherit the environment that this file has changed.
os.environ.setdefault("PERCEIVER_TEST_CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
# Set before any test imports Keras, Ray or MLflow. Processes that tests start inherit it.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    DO_NOT_TRACK="true",
    KERAS_BACKEND="tensorflow",
    MLFLOW_DISABLE_TELEMETRY="true",
    PERCEIVER_TEST_SESSION=secrets.token_hex(16),
    RAY_AUTH_TOKEN=secrets.token_hex(16),  # otherwise ray.init() writes one to the home directory
    RAY_USAGE_STATS_ENABLED="0",
    TF_CPP_MIN_LOG_LEVEL="2",
)
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
    os.environ.pop(name, None)  # a test must not write to the user's server
for name in ("PERCEIVER_STORAGE", "RAY_ADDRESS"):
    os.environ.pop(name, None)  # nor to the user's storage, nor start work in the user's cluster

CIFAR100_SHA256 = "0e3f37122b9147361d823b7b16f3a4015b4371d0fd7630f6e8019ff716bf3b1d"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives those that take long half an hour: on a slow machine, three pipelines took more than ten minutes."""
    for item in items:
        takes_long = item.get_closest_marker("long") or item.get_closest_marker("slow")
        if takes_long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


def pytest_collection_finish() -> None:
    """Exempts the modules that are imported by now from garbage collection: walking all of them takes a second."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fails the session if a process that a test started outlives it, and ends that process."""
    yield
    # Ray's processes take a moment to see that their raylet is gone; its agents took over 15 s after a SIGKILL.
    deadline = time.monotonic() + 60
    while (left := processes_of_this_session()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlived the tests:\n" + "\n".join(f"{pid} {command}" for pid, command in left.items())


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Folder for the `RAY_TMPDIR` of drivers that a test starts."""
    # Ray creates Unix sockets in it, whose paths may have 107 bytes at most. tmp_path is too long for that.
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with 2 CPUs."""
    import ray

    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a process connects to Ray; the one of the tests is connected if `ray_cluster` was used in it before."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def cifar100_archive(pytestconfig: pytest.Config) -> tuple[Path, str]:
    """Path and SHA-256 of a CIFAR-100 archive: `$CIFAR100_ARCHIVE`, or the copy beside the checkout."""
    beside = pytestconfig.rootpath.parent / "shared" / "data" / "cifar-100-python.tar.gz"
    path = Path(os.environ.get("CIFAR100_ARCHIVE", beside))
    if not path.is_file():
        pytest.skip(f"no CIFAR-100 archive at {path}: set CIFAR100_ARCHIVE to one")
    if path == beside:
        return path, CIFAR100_SHA256
    with path.open("rb") as file:
        return path, hashlib.file_digest(file, "sha256").hexdigest()
