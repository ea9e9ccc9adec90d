"""The runtime environment of the processes that train: how they allocate memory, and what they import ahead."""

import os
from typing import Any

import ray

from pipeline.workers import reserve

ALLOCATION = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Settings of glibc's `malloc`, which reads them when a process starts; other C libraries ignore them."""


def of_workers(has_reserve: bool) -> dict[str, Any]:
    """The runtime environment of the workers.

    A step allocates and frees the same buffers as the step before it: gradients, and messages of the all-reduce.
    `malloc` returns much of that to the kernel at once, in particular from the arenas that it gives to threads other
    than the first, so that a fifth of a worker's time was page faults (docs/results.md). With one arena that keeps up
    to 256 MiB, the pages stay. A variable that the user has set, for this process or for its job, keeps its value.

    Args:
        has_reserve: Whether processes in reserve import TensorFlow ahead.
    """
    own = os.environ.keys() | (ray.get_runtime_context().runtime_env.get("env_vars") or {}).keys()
    variables = {name: value for name, value in ALLOCATION.items() if name not in own}
    environment: dict[str, Any] = {"env_vars": variables} if variables else {}
    return reserve.with_reserve(environment) if has_reserve else environment
