"""Training on several workers with Ray Train: `train` starts it, `train_loop_per_worker` is what each worker runs."""

import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from perceiver.config import PerceiverConfig
from pipeline.data.ray_rows import CorruptShardError, materialize_split, to_rows
from pipeline.data.rows import Rows
from pipeline.data.streamed_rows import StreamedRows
from pipeline.devices import OutOfMemoryError, used_device, used_gpus
from pipeline.storage import CorruptFileError, Storage
from pipeline.training.checkpoint_store import STATE_FILE, CheckpointStore
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import EpochEnded, OwnModelError, Worker, val_score
from pipeline.workers import environment, ray_internals, reserve
from pipeline.workers.failures import why
from pipeline.workers.in_process import TrainingError, train_in_process
from pipeline.workers.streaming import check_streams, streamed_rows, streamed_splits
from pipeline.workers.tensorflow_backend import TensorFlowConfig, WorkerError, guard_port
from pipeline.workflow.channel import Channel
from pipeline.workflow.task import StoppedEarly

FAILURE_FILE = "failure.json"
MAX_START_FAILURES = 3
"""How often a worker group that cannot start (no room, a broken environment) is tried."""
# Interval at which Ray's controller asks the workers: a death, a report and the end are noticed that much later.
POLL_SECONDS = 0.5
# Interval at which the size of an elastic worker group is compared with what the cluster has.
RESIZE_SECONDS = 30.0
# How long an elastic group waits for resources that Ray reports as free; groups of a fixed size wait Ray's own 60 s.
ELASTIC_START_SECONDS = 20.0


def train(
    model: PerceiverConfig | OwnModel,
    config: TrainingConfig,
    manifest: dict[str, Any],
    storage: Storage,
    *,
    state: str,
    channel: Channel,
    initial_model: str | None = None,
) -> dict[str, Any]:
    """Trains `model` on the workers that `config` asks for; continues from the last checkpoint below `state`, if any.

    Args:
        model: Model settings, or a model of one's own, with the pixel statistics of the data. The workers get a plain
            `PerceiverConfig`, so that they need not import the settings' own class.
        config: Training settings.
        manifest: Output of `preprocess`.
        storage, state: Where the shards are and, below `state`, the checkpoints go; the same for all attempts.
        channel: Gets `CheckpointsDamaged`, `EpochEnded` and `StepProgress` events; its stop request ends the training
            with a checkpoint.
        initial_model: Storage path of the `.keras` file with the initial weights, if any.

    Returns:
        `history` (metrics of every epoch), `images_per_second` (median over the epochs), `epochs`, `best_epoch`,
        `num_workers` (those that trained last), `gpus_per_worker` and `device` (what they computed on, by name) and
        `checkpoint`, the storage path of a folder that holds `model.keras`.

    Raises:
        CorruptShardError: if a shard is not what the manifest says.
        ValueError: if the shuffle window or the cache is too small for the shards.
        StoppedEarly: after a stop request.
        TrainingError: if the loss is NaN or infinite, the model is refused, or workers died or did not start too often.
    """
    ray_internals.check_ray()
    os.environ.setdefault(ray_internals.POLL_SECONDS_VARIABLE, str(POLL_SECONDS))
    start_failures = MAX_START_FAILURES
    if config.min_workers < config.max_workers:
        # Ray learns late that a host is gone, and first waits for room on it: one start that fails for each host lost.
        os.environ.setdefault(ray_internals.START_SECONDS_VARIABLE, str(ELASTIC_START_SECONDS))
        start_failures += config.max_failures
    store = CheckpointStore(storage, f"{state}/checkpoints", config.checkpoints_kept)
    streamed, failed = streamed_splits(manifest, config), f"{state}/{FAILURE_FILE}"
    check_streams(manifest, streamed, storage, config)
    storage.delete(failed)
    trainer = DataParallelTrainer(
        train_loop_per_worker=train_loop_per_worker,
        train_loop_config={
            "model": PerceiverConfig(**asdict(model)) if isinstance(model, PerceiverConfig) else model,
            "train": asdict(config),
            "channel": channel,
            "store": store,
            "initial_model": (storage, initial_model) if initial_model else None,
            "class_counts": manifest["splits"]["train"]["class_counts"],
            "manifest": manifest,
            "streamed": streamed,
            "storage": storage,
            "failed": failed,
        },
        backend_config=TensorFlowConfig(channel, config.use_gpu, config.precision, isinstance(model, PerceiverConfig)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,  # type: ignore[call-arg]
            use_gpu=config.use_gpu,
            # Over the hosts, whose cores and memory they would share; GPUs of one host reach one another faster.
            placement_strategy="PACK" if config.use_gpu else "SPREAD",
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="ray-train",
            storage_path=storage.absolute(state),
            worker_runtime_env=environment.of_workers(model, config.use_gpu, config.has_reserve),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures,
                controller_failure_limit=start_failures,  # type: ignore[call-arg]
            ),
        ),
        # Every worker sees all rows and takes its share of each global batch by rank: which rows a step trains on then
        # does not depend on the number of workers, and no row is dropped to make shards equal.
        datasets={
            split: materialize_split(manifest, split, storage)
            for split in ("train", "validation")
            if split not in streamed
        },
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    try:
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        if not storage.exists(failed):
            raise TrainingError(why(error, config)) from error
        outcome = storage.read_json(failed)
    if "corrupt" in outcome:
        raise CorruptShardError(*outcome["corrupt"])
    if "error" in outcome:
        raise TrainingError(outcome["error"])
    checkpoint = store.path(outcome["checkpoint"])
    progress = storage.read_json(f"{checkpoint}/{STATE_FILE}")
    if not progress["finished"]:
        raise StoppedEarly
    history = progress["history"]
    return {
        "history": history,
        "epochs": len(history),
        "best_epoch": min(history, key=val_score)["epoch"],
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in history),
        **{name: outcome[name] for name in ("num_workers", "gpus_per_worker", "device")},
        "checkpoint": checkpoint,
    }


def train_loop_per_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs.

    Of an elastic group as many workers train as divide the global batch; the others stand by.

    Args:
        settings: `model`, `train` (a plain dict), `channel`, `store`, `initial_model` (storage and path, or None),
            `class_counts` of the training rows, `manifest` of the data and their `storage`, the splits that are
            `streamed` and the storage path `failed`, where a worker says why another try would fail too.

    Returns:
        `num_workers` that trained, `gpus_per_worker`, the `device` of this one and the name of the last `checkpoint`;
        or, if another try would fail too, `error` or the arguments of a `CorruptShardError`, `corrupt`.
    """
    context = ray.train.get_context()
    config = TrainingConfig(**settings["train"])
    channel: Channel = settings["channel"]
    store: CheckpointStore = settings["store"]
    rank, num_workers = context.get_world_rank(), config.usable_workers(context.get_world_size())
    some_stand_by = num_workers < context.get_world_size()
    newest: str | None = None
    keep_reserve = reserve.keep_one(context.get_local_rank(), context.get_local_world_size())

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal newest
        if config.has_reserve:
            keep_reserve()
        if folder is not None:
            newest = store.commit(folder, metrics["epoch"], metrics.get("step", 0), metrics.get("val_loss", math.inf))
        if "loss" in metrics:
            if some_stand_by:
                broadcast_from_rank_zero(True)
            ray.train.report(metrics)
            if rank == 0:
                channel.report(EpochEnded(metrics))

    def rows(split: str) -> Rows | StreamedRows:
        if split in settings["streamed"]:
            return streamed_rows(settings["manifest"], split, settings["storage"], config)
        return to_rows(ray.train.get_dataset_shard(split))

    is_preempted = ray_internals.preemption_watch()

    def on_stop(request: Callable[[], None]) -> None:
        check_port()  # `fit` calls this when the strategy exists, and before it trains
        channel.on_stop(request)
        threading.Thread(target=_wait_for_preemption, args=(is_preempted, request), daemon=True).start()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        # Rank 0 looks for the newest one, so that all workers continue from the same.
        found = None if rank else (store.restore_newest(checkpoint, channel.report), _said_by_earlier_workers(settings))
        newest, said = broadcast_from_rank_zero(found)
        if said:
            return said
        if rank >= num_workers:
            _stand_by()
            return {}
        if rank and newest and not store.restore(newest, checkpoint):
            raise WorkerError(f"the checkpoint {store.path(newest)} has not arrived whole at worker {rank}")
        initial = Path(folder) / "initial.keras" if settings["initial_model"] and not newest else None
        if initial:
            storage, path = settings["initial_model"]
            storage.download(path, initial)
        _leave_out_the_rest(num_workers)
        check_port = guard_port()
        error, preempted = None, False
        try:
            train_in_process(
                settings["model"],
                config,
                rows("train"),
                rows("validation"),
                Worker(
                    report=report,
                    rank=rank,
                    num_workers=num_workers,
                    resume_from=checkpoint if newest else None,
                    initial_model=initial,
                    on_stop=on_stop,
                    on_step=channel.report,
                ),
                settings["class_counts"],
            )
        except StoppedEarly:
            preempted = is_preempted()
        except (TrainingError, OutOfMemoryError) as failure:
            error = str(failure)
            # Of most errors all workers know; raising would start them again, only to fail again.
            may_be_alone = isinstance(failure, OutOfMemoryError) or isinstance(failure.__cause__, OwnModelError)
            if num_workers > 1 and may_be_alone:
                # The others wait for this worker, so it has to raise. Those that are started again find it said.
                settings["storage"].write_json(settings["failed"], {"error": error})
                raise
        except CorruptFileError as failure:
            named = [failure.path, failure.expected, failure.found]
            settings["storage"].write_json(settings["failed"], {"corrupt": named})
            raise
    if some_stand_by:
        broadcast_from_rank_zero(False)
    if preempted:
        raise WorkerError("a host of the workers is about to be taken away; the checkpoint of the last step is whole")
    used = {"num_workers": num_workers, "gpus_per_worker": used_gpus(), "device": used_device()}
    return {"error": error} if error else used | {"checkpoint": newest}


def _said_by_earlier_workers(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Why another try would fail too: what `train_loop_per_worker` returns then."""
    storage, path = settings["storage"], settings["failed"]
    return storage.read_json(path) if storage.exists(path) else None


def _wait_for_preemption(is_preempted: Callable[[], bool], request: Callable[[], None]) -> None:
    """Calls `request` once Ray has noticed that a host of the workers is about to be taken away."""
    while not is_preempted():
        time.sleep(POLL_SECONDS)
    request()


def _stand_by() -> None:
    """Reports as often as the workers that train, as Ray Train wants of all."""
    while broadcast_from_rank_zero(None):
        ray.train.report({})


def _leave_out_the_rest(num_workers: int) -> None:
    """Takes those that stand by off the list of workers that TensorFlow waits for."""
    tf_config = json.loads(os.environ["TF_CONFIG"])
    tf_config["cluster"]["worker"] = tf_config["cluster"]["worker"][:num_workers]
    os.environ["TF_CONFIG"] = json.dumps(tf_config)
