"""The processes that train keep the memory that they allocate again in each step, and use oneDNN's kernels."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import ray

from perceiver.presets import quickstart
from perceiver.processor import is_x86_64
from pipeline.workers import environment

BYTES = 2 << 20
BUFFERS, ROUNDS = 48, 20
PAGES = ROUNDS * BUFFERS * BYTES // resource.getpagesize()


@pytest.fixture
def faults() -> Callable[[], int]:
    """Counts the page faults of its process while a thread other than its first allocates and frees memory often."""

    def count() -> int:
        def allocate() -> None:
            for _ in range(ROUNDS):
                [np.ones(BYTES, np.uint8) for _ in range(BUFFERS)]  # more than one heap of an arena

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return count


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("has_reserve", [False, True])
def test_workers_keep_their_memory(
    faults: Callable[[], int], monkeypatch: pytest.MonkeyPatch, has_reserve: bool
) -> None:
    for name in environment.ALLOCATION:
        monkeypatch.delenv(name, raising=False)
    count = ray.remote(num_cpus=0)(faults)
    kept = ray.get(
        count.options(runtime_env=environment.of_workers(quickstart(), use_gpu=False, has_reserve=has_reserve)).remote()
    )
    returned = ray.get(count.remote())
    # Each page once, the first time.
    assert kept < min(1.5 * PAGES / ROUNDS, returned / 2)


@pytest.mark.usefixtures("ray_cluster")
def test_variables_of_ones_own_keep_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    names = environment.of_workers(quickstart(), use_gpu=False, has_reserve=False)["env_vars"].keys()
    assert names == {*environment.ALLOCATION, *(environment.ONEDNN if is_x86_64() else ())}
    for name in names:
        monkeypatch.setenv(name, "65536")
        assert name not in environment.of_workers(quickstart(), False, False).get("env_vars", {})
    assert environment.of_workers(quickstart(), use_gpu=False, has_reserve=False) == {}
    environment.choose_kernels(quickstart(), use_gpu=False)
    assert {os.environ[name] for name in names} == {"65536"}


TRAINS = """
import os
from perceiver.presets import quickstart
from pipeline.training.own_model import OwnModel
from pipeline.workers.environment import choose_kernels
choose_kernels({model}, use_gpu={use_gpu})
print(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))
import tensorflow
"""


@pytest.mark.skipif(not is_x86_64(), reason="oneDNN's kernels are asked for on x86-64")
@pytest.mark.parametrize(
    ("model", "use_gpu", "variable"),
    [("quickstart()", False, "1"), ("quickstart()", True, "None"), ("OwnModel(print)", False, "None")],
)
def test_tensorflow_uses_onednn_for_a_perceiver(model: str, use_gpu: bool, variable: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in environment.ONEDNN}
    done = subprocess.run(
        [sys.executable, "-c", TRAINS.format(model=model, use_gpu=use_gpu)],
        env=environ | {"TF_CPP_MIN_LOG_LEVEL": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == variable
    if variable == "1":  # elsewhere it depends on the processor
        assert "oneDNN custom operations are on" in done.stderr
