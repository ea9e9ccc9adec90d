"""benchmarks/gpu.py runs on a CPU, at sizes that take seconds, so that it is in order where there is a GPU."""

import re
import subprocess
import sys

import pytest
from benchmark_run import BENCHMARKS, benchmark


@pytest.mark.long
def test_gpu_without_a_gpu() -> None:
    table, result = benchmark("gpu", "--smoke")
    assert "Forward and backward pass of the parts" in table
    assert result["device"] in table
    assert {(row["job"], row["variant"]) for row in result["steps"]} >= {
        ("cifar100_gpu, tiny", "own"),
        ("cifar100_gpu, tiny", "plain Keras, XLA"),
        ("paper_imagenet, tiny", "own"),
    }
    assert all(row["images_per_second"] > 0 and 0 < row["mfu"] < 1 and row["is_finite"] for row in result["steps"])
    assert {row["part"].partition(",")[0] for row in result["parts"]} == {"attention", "LayerNorm", "GELU"}
    assert max(row["difference"] for row in result["parts"]) < 1e-3
    assert min(result["augmented_per_second"].values()) > 0


@pytest.mark.slow
def test_gpu_with_several_workers() -> None:
    table, result = benchmark("gpu", "--smoke", "--workers", "1", "2")
    assert "Workers on this host" in table
    assert set(result["workers"]) == {"1", "2"}
    assert min(result["workers"].values()) > 0


def test_gpu_needs_one_without_smoke() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert re.search(r"(?m)^error: use_gpu: .* sees none there", done.stderr)
    assert "Traceback" not in done.stderr
