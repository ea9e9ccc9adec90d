"""Training of a Perceiver as one worker sees it: `fit`, the same for a trial, for one worker and for many.

Knows nothing of Ray. What it reports, where it goes on from and how it is asked to stop come with a `Worker`.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline import checkpoint, multiworker
from pipeline.batches import ImageArrays, evaluation_slices, steps_per_epoch, train_batches
from pipeline.checkpoint import Progress
from pipeline.config import TrainingConfig
from pipeline.optimization import PLATEAU_FACTOR, SmoothedCrossEntropy, optimizer

MODEL_FILE = "model.keras"
PREFETCHED_BATCHES = 4
CALLBACK_STATE = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")


class Interrupted(Exception):
    """A stop was requested; a checkpoint has been reported."""


class NotFinite(Exception):
    """The loss became NaN or infinite."""


@dataclass
class Worker:
    """One of the processes that train a model together.

    Attributes:
        report: takes the metrics of an epoch and, at rank 0, the folder of a checkpoint, which it must have copied when
            it returns; every worker calls it equally often.
        rank: number of this worker, from 0.
        num_workers: how many there are.
        resume_from: checkpoint to go on from.
        on_stop: is given a function that it shall call, from any thread, to end the training with a checkpoint.
    """

    report: Callable[[dict[str, Any], Path | None], None]
    rank: int = 0
    num_workers: int = 1
    resume_from: Path | None = None
    on_stop: Callable[[Callable[[], None]], None] = lambda request: None


def fit(
    model_config: PerceiverConfig, config: TrainingConfig, train: ImageArrays, validation: ImageArrays, worker: Worker
) -> None:
    """Trains to the end; what comes of it is in the reports.

    Each report has the metrics of an epoch (`epoch`, `loss`, `accuracy`, `top5_accuracy`, the same with `val_`,
    `learning_rate`, `images_per_second`, `seconds`) and a checkpoint. The last checkpoint holds `model.keras` too: the
    model with the weights of the epoch whose validation loss was lowest.

    Args:
        train: all training rows, of which this worker takes its share of every global batch.
        validation: all validation rows, likewise.

    Raises:
        Interrupted: after a stop was requested and a checkpoint reported.
        NotFinite: if the loss is NaN or infinite; names epoch and step.
    """
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if worker.num_workers > 1 else tf.distribute.get_strategy()
    stop = multiworker.StopSignal()  # after the strategy, which must come before all of TensorFlow's operations
    worker.on_stop(stop.request)
    steps = steps_per_epoch(len(train.labels), config.global_batch_size)
    with strategy.scope():
        model = Perceiver(**asdict(model_config))
        model.build((None, *model_config.image_shape))
        model.compile(
            optimizer=optimizer(config, model, steps),
            loss=SmoothedCrossEntropy(config.label_smoothing),
            metrics=[
                keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
                keras.metrics.SparseTopKCategoricalAccuracy(k=5, name="top5_accuracy"),
            ],
            jit_compile=False,  # XLA has no collectives on CPU devices
        )
        progress = checkpoint.load(worker.resume_from, model) if worker.resume_from else Progress()
    multiworker.enable(model, stop)

    stopping: list[keras.callbacks.Callback] = [
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=config.early_stopping_patience)
    ]
    if config.learning_rate_schedule == "plateau":
        stopping.append(
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_loss", factor=PLATEAU_FACTOR, patience=config.plateau_patience
            )
        )
    recorder = Recorder(config, worker, stop, progress, stopping, steps)
    validation_data = multiworker.distribute(_validation(validation, config, worker), strategy)
    while not progress.finished:
        # An epoch that was cut off in the middle has fewer steps left than the others, so it is a `fit` of its own.
        steps_left = steps - progress.step
        until = config.epochs if progress.step == 0 else progress.epoch + 1
        batches = _training(train, config, worker, progress)
        model.fit(
            multiworker.distribute(batches, strategy),
            initial_epoch=progress.epoch,
            epochs=until,
            steps_per_epoch=steps_left,
            validation_data=validation_data,
            validation_steps=-(-len(validation.labels) // config.global_batch_size),
            callbacks=[*stopping, recorder],
            verbose=0,
        )
    summary = {"finished": True, "history": progress.history}
    if worker.rank:
        worker.report(summary, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), model, progress)
        final = Perceiver(**asdict(model_config))
        final.build((None, *model_config.image_shape))
        final.set_weights(progress.best_weights)
        final.save(Path(folder) / MODEL_FILE)
        worker.report(summary, Path(folder))


class Recorder(keras.callbacks.Callback):
    """Reports every epoch with a checkpoint, keeps the best weights, and ends the training when asked to.

    It stands last among the callbacks, so that what the others did in an epoch is in the checkpoint of that epoch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        worker: Worker,
        stop: multiworker.StopSignal,
        progress: Progress,
        others: list[keras.callbacks.Callback],
        steps_per_epoch: int,
    ) -> None:
        super().__init__()
        self.config, self.worker, self.stop, self.progress, self.others = config, worker, stop, progress, others
        self.steps_per_epoch = steps_per_epoch
        self._first_step = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        for callback in self.others:  # `fit` has just reset them
            for name, value in self.progress.callbacks.get(type(callback).__name__, {}).items():
                setattr(callback, name, value)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._first_step = self.progress.step
        self._epoch_start = time.perf_counter()
        if self.progress.metrics:
            checkpoint.set_metric_values(self.model, self.progress.metrics)
            self.progress.metrics = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        now = time.perf_counter()
        self.progress.step += 1
        if self.progress.step == self._first_step + 1:
            self._after_first_step = now  # tracing takes place in the first step of all
        self._after_last_step = now
        loss = float(np.squeeze((logs or {})["loss"]))
        if not math.isfinite(loss):
            raise NotFinite(
                f"the training loss is {loss} at epoch {self.progress.epoch + 1}, step {self.progress.step}: "
                f"lower train.learning_rate = {self.config.learning_rate}"
            )
        if self.stop.agreed and self.progress.step < self.steps_per_epoch:
            self.progress.metrics = checkpoint.metric_values(self.model)
            self._report({"epoch": self.progress.epoch, "interrupted": True})
            raise Interrupted

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        progress, now = self.progress, time.perf_counter()
        metrics = {name: float(np.squeeze(value)) for name, value in (logs or {}).items()}
        timed_steps = progress.step - self._first_step - 1
        metrics |= {
            "epoch": epoch + 1,
            "learning_rate": float(self.model.optimizer.learning_rate.numpy()),
            "seconds": now - self._epoch_start,
            "images_per_second": timed_steps
            * self.config.global_batch_size
            / max(self._after_last_step - self._after_first_step, 1e-9),
        }
        if metrics["val_loss"] <= min((past["val_loss"] for past in progress.history), default=math.inf):
            progress.best_weights = self.model.get_weights()
        progress.history.append(metrics)
        progress.epoch, progress.step = epoch + 1, 0
        progress.finished = self.model.stop_training or progress.epoch == self.config.epochs
        progress.callbacks = {type(c).__name__: _state(c) for c in self.others}
        self._report(metrics)
        if self.stop.agreed and not progress.finished:
            raise Interrupted

    def _report(self, metrics: dict[str, Any]) -> None:
        if self.worker.rank:
            self.worker.report(metrics, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), self.model, self.progress)
            self.worker.report(metrics, Path(folder))


def _state(callback: keras.callbacks.Callback) -> dict[str, float | None]:
    values = {name: getattr(callback, name, None) for name in CALLBACK_STATE if hasattr(callback, name)}
    return {name: None if value is None else float(value) for name, value in values.items()}


def _training(train: ImageArrays, config: TrainingConfig, worker: Worker, progress: Progress) -> tf.data.Dataset:
    """This worker's share of the global batches from where `progress` is, without end: (b, H, W, C) uint8, (b,)."""
    share = config.global_batch_size // worker.num_workers
    epoch, step = progress.epoch, progress.step
    return tf.data.Dataset.from_generator(
        lambda: train_batches(train, config, rank=worker.rank, num_workers=worker.num_workers, epoch=epoch, step=step),
        output_signature=(
            tf.TensorSpec((share, *train.images.shape[1:]), tf.uint8),
            tf.TensorSpec((share,), tf.int32),
        ),
    ).prefetch(PREFETCHED_BATCHES)


def _validation(validation: ImageArrays, config: TrainingConfig, worker: Worker) -> tf.data.Dataset:
    """This worker's share of the validation rows, again and again, each time each row once over all workers.

    Yields (b, H, W, C) uint8 and (b,).
    """
    slices = evaluation_slices(
        len(validation.labels), config.global_batch_size, rank=worker.rank, num_workers=worker.num_workers
    )
    with tf.device("CPU"):
        images, labels = tf.constant(validation.images), tf.constant(validation.labels)
    return (
        tf.data.Dataset.from_tensor_slices(slices)
        .repeat()
        .map(lambda rows: (images[rows[0] : rows[1]], labels[rows[0] : rows[1]]))
        .prefetch(PREFETCHED_BATCHES)
    )
