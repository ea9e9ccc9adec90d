"""What a person is told of a training that has failed."""

import ray
import ray.train

from pipeline.data.shard_cache import CacheError
from pipeline.data.shard_reader import ShardUnavailableError
from pipeline.devices import DeviceError
from pipeline.training.checkpoint_store import CheckpointError
from pipeline.training.config import TrainingConfig
from pipeline.workers import ray_internals
from pipeline.workers.tensorflow_backend import WorkerError


def why(error: ray.train.TrainingFailedError, config: TrainingConfig) -> str:
    """The failure that explains the others: when one worker fails, its peers lose their connection to it."""
    if ray_internals.start_timed_out(getattr(error, "controller_failure", None)):
        free = ray.available_resources()
        return (
            f"the workers did not start in time: train.num_workers = {config.min_workers} with train.cpus_per_worker = "
            f"{config.cpus_per_worker:g}{' and a GPU each' if config.use_gpu else ''} found no room, of "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free now: wait until there are more, "
            "or take fewer workers; the same command goes on from the last checkpoint"
        )
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    causes = [getattr(failure, "cause", failure) for failure in failures]  # of Ray's wrapping
    named = (CheckpointError, DeviceError, WorkerError, ShardUnavailableError, CacheError)
    explained = [str(cause) for cause in causes if isinstance(cause, named)]
    return explained[0] if explained else str(error)
