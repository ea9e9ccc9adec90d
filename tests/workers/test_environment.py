"""The processes that train keep the memory that they allocate again in each step."""

import resource
import threading
from collections.abc import Callable

import numpy as np
import pytest
import ray

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
    kept = ray.get(count.options(runtime_env=environment.of_workers(has_reserve)).remote())
    returned = ray.get(count.remote())
    # Each page once, the first time.
    assert kept < min(1.5 * PAGES / ROUNDS, returned / 2)


@pytest.mark.usefixtures("ray_cluster")
def test_variables_of_ones_own_keep_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = environment.ALLOCATION
    monkeypatch.setenv(first, "2")
    assert environment.of_workers(has_reserve=False)["env_vars"].keys() == set(others)
    for name in others:
        monkeypatch.setenv(name, "65536")
    assert environment.of_workers(has_reserve=False) == {}
