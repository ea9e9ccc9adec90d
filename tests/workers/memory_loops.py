"""A training loop for test_memory_of_workers.py whose second worker has no memory left; pickled into the workers."""

import sys
from pathlib import Path
from typing import Any

import ray
import ray.train

from pipeline.workers import train

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

real_loop = train.train_loop_per_worker


def exhausted_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """The real loop; the second worker finds no memory at its third step. Each start adds a line to `starts`."""
    import tensorflow as tf

    from pipeline.training import recorder

    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        with Path(settings["starts"]).open("a") as log:
            log.write("started\n")
    after_step = recorder.Recorder.on_train_batch_end

    def exhaust(recorder: Any, batch: int, logs: dict[str, Any] | None = None) -> None:
        if rank == 1 and batch == 2:
            where = "on /job:worker/device:GPU:0 by allocator GPU_0_bfc"
            raise tf.errors.ResourceExhaustedError(None, None, f"OOM when allocating tensor with shape[9,9] {where}")
        after_step(recorder, batch, logs)

    recorder.Recorder.on_train_batch_end = exhaust  # type: ignore[method-assign, assignment]
    return real_loop(settings)
