"""The environment of the processes that train: their memory, their kernels, and what they import ahead."""

import os
from typing import Any

import ray

from perceiver.config import PerceiverConfig
from perceiver.processor import is_x86_64
from pipeline.training.own_model import OwnModel
from pipeline.workers import reserve

ALLOCATION = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""Settings of glibc's `malloc`, which reads them when a process starts; other C libraries ignore them."""
ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "1"}
"""Makes TensorFlow use oneDNN's kernels. It reads the variable when it is imported."""


def kernels(model: PerceiverConfig | OwnModel, use_gpu: bool) -> dict[str, str]:
    """Variables for a process that trains `model`.

    TensorFlow uses oneDNN's kernels only on processors with AVX-512 VNNI or later instructions, unless it is told to.
    Those for AVX2 make the training of `cifar100` in float32 1.5 times as fast (docs/results.md). A model of one's own
    keeps TensorFlow's choice, since TensorFlow 2.21 with oneDNN corrupts memory when a matmul broadcasts a batch of
    one, which a Perceiver avoids. Processors other than x86-64 and GPUs keep it too.
    """
    return dict(ONEDNN) if is_x86_64() and isinstance(model, PerceiverConfig) and not use_gpu else {}


def choose_kernels(model: PerceiverConfig | OwnModel, use_gpu: bool) -> None:
    """Sets `kernels` in this process, for TensorFlow to be imported later; variables that are set keep their values."""
    for name, value in kernels(model, use_gpu).items():
        os.environ.setdefault(name, value)


def of_workers(model: PerceiverConfig | OwnModel, use_gpu: bool, has_reserve: bool) -> dict[str, Any]:
    """The runtime environment of workers that train `model`.

    A step allocates and frees the same buffers as the step before it: gradients, and messages of the all-reduce.
    `malloc` returns much of that to the kernel at once, in particular from the arenas that it gives to threads other
    than the first, so that a fifth of a worker's time was page faults (docs/results.md). With one arena that keeps up
    to 256 MiB, the pages stay. A variable that the user has set, for this process or for its job, keeps its value.

    Args:
        model: What they train.
        use_gpu: Whether each computes on a GPU.
        has_reserve: Whether processes in reserve import TensorFlow ahead.
    """
    own = os.environ.keys() | (ray.get_runtime_context().runtime_env.get("env_vars") or {}).keys()
    variables = {name: value for name, value in (ALLOCATION | kernels(model, use_gpu)).items() if name not in own}
    environment: dict[str, Any] = {"env_vars": variables} if variables else {}
    return reserve.with_reserve(environment) if has_reserve else environment
