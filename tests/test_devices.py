"""Processes that Ray gave a GPU on which TensorFlow cannot compute.

Ray is told of GPUs that do not exist, as on a host whose TensorFlow lacks the CUDA libraries. No GPU is needed, and the
tests hide one that is there.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.devices import GpuError, multiply_on_gpu, require_gpu

ROOT = Path(__file__).parents[1]
SEES_NONE = r"use.gpu: Ray gave a process on \S+ the GPU .* TensorFlow \S+, built .*, sees none there; NVIDIA's"
RUN = ("pipeline/run.py", "quickstart", "--train.num-workers", "1", "--storage")


@pytest.fixture(scope="module")
def cluster(ray_folder: Path) -> Iterator[str]:
    """Address of a cluster with two logical GPUs. The ids are of no GPU, also on a machine that has some."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "97,98"}
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
            head.send_signal(signal.SIGTERM)
            head.wait(60)


def run(address: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a command of the project in the cluster; returns its exit code and what it printed, lines joined."""
    environment = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_the_message_names_what_is_there_and_the_remedy() -> None:
    with pytest.raises(GpuError, match=rf"^train\.{SEES_NONE} .*: .*--train\.no-use-gpu$"):
        require_gpu("train.use_gpu")
    does_not = r"^use_gpu: the GPU of a process on \S+ does not multiply matrices: .*CPU:0 gave 64.*--no-use-gpu$"
    with pytest.raises(GpuError, match=does_not):
        multiply_on_gpu("use_gpu")


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
