"""Training on several workers with Ray Train: `train`, the one driver, and `train_loop_per_worker`.

`train_in_process` is the same training in the calling process, for trials.
"""

import contextlib
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.tensorflow import TensorflowTrainer

from perceiver.config import PerceiverConfig
from pipeline.batches import ImageArrays
from pipeline.board import Board
from pipeline.config import TrainingConfig
from pipeline.preprocess import materialize_split, to_arrays
from pipeline.storage import Storage
from pipeline.workflow import StoppedEarly

NUM_CHECKPOINTS_KEPT = 2
# A worker group that cannot start (no room, a broken environment) is tried this often, not for ever.
MAX_START_FAILURES = 3


class TrainingError(RuntimeError):
    """The training cannot succeed by trying again."""


def train(
    model: PerceiverConfig,
    config: TrainingConfig,
    manifest: dict[str, Any],
    storage: Storage,
    *,
    state: str,
    board: Board,
) -> dict[str, Any]:
    """Trains `model` on the workers that `config` asks for; goes on from the last checkpoint below `state`, if any.

    Args:
        model: with the pixel statistics of the data filled in.
        manifest: of the preprocessed data.
        state: storage prefix of the checkpoints; the same for all attempts.
        board: gets every epoch's metrics as an event; its stop request ends the training with a checkpoint.

    Returns:
        `history` (metrics of every epoch), `images_per_second` (median over the epochs), `epochs`, `best_epoch`,
        `num_workers` and `checkpoint`, the storage path of a folder that holds `model.keras`.

    Raises:
        CorruptShardError: if a shard is not what the manifest says.
        StoppedEarly: after a stop request.
        TrainingError: if the loss became NaN or infinite.
    """
    trainer = TensorflowTrainer(
        train_loop_per_worker=train_loop_per_worker,
        train_loop_config={"model": asdict(model), "train": asdict(config), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=storage.absolute(state),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=NUM_CHECKPOINTS_KEPT),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures,
                controller_failure_limit=MAX_START_FAILURES,  # type: ignore[call-arg]  # Ray types it as the old class
            ),
        ),
        # Every worker sees all rows and takes its share of each global batch by rank: which rows a step trains on then
        # does not depend on the number of workers, and no row is dropped to make shards equal.
        datasets={split: materialize_split(manifest, split, storage) for split in ("train", "validation")},
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    result = trainer.fit()
    last = result.metrics or {}
    if last.get("interrupted"):
        raise StoppedEarly
    if "error" in last:
        raise TrainingError(last["error"])
    assert result.checkpoint is not None
    history = last["history"]
    return {
        "history": history,
        "epochs": len(history),
        "best_epoch": min(history, key=lambda epoch: epoch["val_loss"])["epoch"],
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in history),
        "num_workers": config.num_workers,
        "checkpoint": f"{state}/checkpoints/{Path(result.checkpoint.path).name}",
    }


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs; `settings` has `model`, `train` (plain dicts) and `board`."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    board: Board = settings["board"]

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None)
        if rank == 0 and "images_per_second" in metrics:
            board.post(task="train", metrics=metrics)

    checkpoint = ray.train.get_checkpoint()
    try:
        with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
            train_in_process(
                PerceiverConfig(**settings["model"]),
                TrainingConfig(**settings["train"]),
                to_arrays(ray.train.get_dataset_shard("train")),
                to_arrays(ray.train.get_dataset_shard("validation")),
                report=report,
                resume_from=Path(folder) if folder else None,
                board=board,
                rank=rank,
                num_workers=num_workers,
            )
    except StoppedEarly:
        pass  # the checkpoint and the reason are reported
    except TrainingError as error:
        # Raising would start the workers again, only to fail again.
        ray.train.report({"error": str(error)})


def train_in_process(
    model: PerceiverConfig,
    config: TrainingConfig,
    train: ImageArrays,
    validation: ImageArrays,
    *,
    report: Callable[[dict[str, Any], Path | None], None],
    resume_from: Path | None,
    board: Board | None = None,
    rank: int = 0,
    num_workers: int = 1,
) -> None:
    """Trains as one worker in this process, on `config.cpus_per_worker` CPUs; see `pipeline.fit.fit`.

    Raises:
        StoppedEarly: after a stop request.
        TrainingError: if the loss became NaN or infinite.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Imported here, not at the top: processes that only start workers do without TensorFlow.
    import tensorflow as tf

    from pipeline.fit import Interrupted, NotFinite, Worker, fit

    # Ray sets no threads for TensorFlow, which would take all cores of the host for every worker.
    threads = max(1, int(config.cpus_per_worker))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    worker = Worker(report=report, rank=rank, num_workers=num_workers, resume_from=resume_from)
    if board is not None:
        worker.on_stop = board.on_stop
    try:
        fit(model, config, train, validation, worker)
    except Interrupted as error:
        raise StoppedEarly from error
    except NotFinite as error:
        raise TrainingError(str(error)) from error
