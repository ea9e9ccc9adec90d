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
from perceiver.cost import macs_per_image
from perceiver.model import Perceiver
from pipeline import checkpoint, multiworker
from pipeline.batches import ImageArrays, steps_per_epoch
from pipeline.checkpoint import Progress
from pipeline.config import TrainingConfig
from pipeline.input_pipeline import training_dataset, validation_dataset
from pipeline.optimization import PLATEAU_FACTOR, Accuracy, SmoothedCrossEntropy, TopKAccuracy, optimizer
from pipeline.throughput import StepClock, StepReporter, matmul_peak

MODEL_FILE = "model.keras"
CALLBACK_STATE = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")


class Interrupted(Exception):
    """A stop was requested; a checkpoint has been reported."""


class NotFinite(Exception):
    """The loss became NaN or infinite."""


class InitialModelError(Exception):
    """The weights to begin with do not fit the model."""


@dataclass
class Worker:
    """One of the processes that train a model together.

    Attributes:
        report: takes metrics and, at rank 0, the folder of a checkpoint, which it must have copied when it returns;
            every worker calls it equally often. At the end of an epoch the metrics are those of the epoch, within one
            they are the position alone: `epoch` (how many are over) and `step`.
        rank: number of this worker, from 0.
        num_workers: how many there are.
        resume_from: checkpoint to go on from.
        initial_model: `.keras` file with the weights to begin with, where there is no checkpoint to go on from.
        on_stop: is given a function that it shall call, from any thread, to end the training with a checkpoint.
        on_step: is told at rank 0, at most once a second, how an epoch gets on (see `StepReporter`); must not block.
        keep_model: whether the last checkpoint holds the model too; nobody asks for that of a trial.
    """

    report: Callable[[dict[str, Any], Path | None], None]
    rank: int = 0
    num_workers: int = 1
    resume_from: Path | None = None
    initial_model: Path | None = None
    on_stop: Callable[[Callable[[], None]], None] = lambda request: None
    on_step: Callable[[dict[str, float]], None] = lambda step: None
    keep_model: bool = True


def fit(
    model_config: PerceiverConfig, config: TrainingConfig, train: ImageArrays, validation: ImageArrays, worker: Worker
) -> None:
    """Trains to the end; what comes of it is in the reports. A training that has ended before reports nothing.

    The report of an epoch has its metrics (`epoch`, `loss`, `accuracy`, `top5_accuracy`, the same with `val_`,
    `learning_rate`, `seconds`, `checkpoint_seconds`, `num_workers`, `images_per_second` and what else
    `StepClock.metrics` has) and a checkpoint; `config.checkpoint_every_steps` makes checkpoints within the epoch too.
    The last checkpoint holds `model.keras` as well: the model with the weights of the epoch whose validation loss was
    lowest.

    Args:
        train: all training rows, of which this worker takes its share of every global batch.
        validation: all validation rows, likewise.

    Raises:
        Interrupted: after a stop was requested and a checkpoint reported.
        NotFinite: if the loss is NaN or infinite; names epoch and step.
        InitialModelError: if the weights to begin with are those of another model.
        CheckpointError: if a checkpoint could not be written; names the path.
        ValueError: if the checkpoint to go on from belongs to another order of rows.
    """
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    strategy = _strategy(config, worker)
    stop = multiworker.StopSignal()  # after the strategy, which must come before all of TensorFlow's operations
    worker.on_stop(stop.request)
    steps = steps_per_epoch(len(train.labels), config.global_batch_size)
    with strategy.scope():
        model = Perceiver(**asdict(model_config))
        model.build((None, *model_config.image_shape))
        model.compile(
            optimizer=optimizer(config, model, steps),
            loss=SmoothedCrossEntropy(config.label_smoothing),
            metrics=[Accuracy(name="accuracy"), TopKAccuracy(5, name="top5_accuracy")],
            jit_compile=config.jit_compile,
        )
        if worker.initial_model and not worker.resume_from:
            _set_initial_weights(model, worker.initial_model, config)
        order = [config.seed, config.global_batch_size, len(train.labels)]
        progress = checkpoint.load(worker.resume_from, model) if worker.resume_from else Progress(order=order)
    if progress.order != order:
        raise ValueError(
            f"the checkpoint is of a training with seed, global batch size and rows {progress.order}, this one has "
            f"{order}: epoch {progress.epoch}, step {progress.step} is another place there; train from the start"
        )
    if progress.finished:
        return
    peak = matmul_peak(keras.config.dtype_policy().compute_dtype)
    clock = StepClock(config.global_batch_size, macs_per_image(model_config), peak, worker.num_workers)
    # TensorFlow refuses to look at the clock in a step that has to be deterministic.
    multiworker.enable(model, stop, None if config.deterministic else clock.note)

    stopping: list[keras.callbacks.Callback] = [
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=config.early_stopping_patience)
    ]
    if config.learning_rate_schedule == "plateau":
        stopping.append(
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_loss", factor=PLATEAU_FACTOR, patience=config.plateau_patience
            )
        )
    recorder = Recorder(config, worker, stop, progress, stopping, clock, steps)
    callbacks = [*stopping, clock, *([] if worker.rank else [StepReporter(clock, worker.on_step, steps)]), recorder]
    evaluated = validation_dataset(
        validation, config.global_batch_size, rank=worker.rank, num_workers=worker.num_workers
    )
    validation_data = multiworker.distribute(evaluated, strategy)
    while not recorder.progress.finished:
        # An epoch that was cut off in the middle has fewer steps left than the others, so it is a `fit` of its own.
        steps_left = steps - progress.step
        until = config.epochs if progress.step == 0 else progress.epoch + 1
        batches = training_dataset(
            train,
            config,
            model_config.num_classes,
            rank=worker.rank,
            num_workers=worker.num_workers,
            epoch=progress.epoch,
            step=progress.step,
        )
        model.fit(
            multiworker.distribute(batches, strategy),
            initial_epoch=progress.epoch,
            epochs=until,
            steps_per_epoch=steps_left,
            validation_data=validation_data,
            validation_steps=-(-len(validation.labels) // config.global_batch_size),
            callbacks=callbacks,
            shuffle=False,  # the batches are in the epoch's order
            verbose=0,
        )
    if worker.rank:
        worker.report(progress.history[-1], None)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), model, progress)
        if worker.keep_model:
            final = Perceiver(**asdict(model_config))
            final.build((None, *model_config.image_shape))
            final.set_weights(progress.best_weights)
            final.save(Path(folder) / MODEL_FILE)
        worker.report(progress.history[-1], Path(folder))


class Recorder(keras.callbacks.Callback):
    """Reports epochs and checkpoints, keeps the best weights, and ends the training when asked to.

    It stands last among the callbacks, so that what the others did in an epoch is in the checkpoint of that epoch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        worker: Worker,
        stop: multiworker.StopSignal,
        progress: Progress,
        others: list[keras.callbacks.Callback],
        clock: StepClock,
        steps_per_epoch: int,
    ) -> None:
        super().__init__()
        self.config, self.worker, self.stop, self.progress, self.others = config, worker, stop, progress, others
        self.clock, self.steps_per_epoch = clock, steps_per_epoch
        self._checkpoint_seconds = 0.0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        for callback in self.others:  # `fit` has just reset them
            for name, value in self.progress.callbacks.get(type(callback).__name__, {}).items():
                setattr(callback, name, value)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch_start = time.perf_counter()
        if self.progress.metrics:
            checkpoint.set_metric_values(self.model, self.progress.metrics)
            self.progress.metrics = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.progress.step += 1
        loss = float(np.squeeze((logs or {})["loss"]))
        if not math.isfinite(loss):
            raise NotFinite(
                f"the training loss is {loss} at epoch {self.progress.epoch + 1}, step {self.progress.step}: "
                f"lower train.learning_rate = {self.config.learning_rate}"
            )
        if self.progress.step == self.steps_per_epoch:
            return  # the end of the epoch is about to be reported
        every, stopped = self.config.checkpoint_every_steps, self.stop.agreed
        if stopped or (every and self.progress.step % every == 0):
            self.progress.metrics = checkpoint.metric_values(self.model)
            self._report({"epoch": self.progress.epoch, "step": self.progress.step})
            self.progress.metrics = []
        if stopped:
            raise Interrupted

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        progress = self.progress
        metrics = {name: float(np.squeeze(value)) for name, value in (logs or {}).items()}
        metrics |= {
            "epoch": epoch + 1,
            "learning_rate": float(self.model.optimizer.learning_rate.numpy()),
            "seconds": time.perf_counter() - self._epoch_start,
            # Of all checkpoints since the last such report: that of this epoch's end is made of it, and comes after it.
            "checkpoint_seconds": self._checkpoint_seconds,
            "num_workers": self.worker.num_workers,
            "images_per_second": self.clock.images_per_second,
            **self.clock.metrics(),
        }
        self._checkpoint_seconds = 0.0
        if metrics["val_loss"] <= min((past["val_loss"] for past in progress.history), default=math.inf):
            progress.best_weights = self.model.get_weights()
        progress.history.append(metrics)
        progress.epoch, progress.step = epoch + 1, 0
        progress.finished = self.model.stop_training or progress.epoch == self.config.epochs
        progress.callbacks = {type(c).__name__: _state(c) for c in self.others}
        if progress.finished:
            return  # `fit` reports it, with the model
        self._report(metrics)
        if self.stop.agreed:
            raise Interrupted

    def _report(self, metrics: dict[str, Any]) -> None:
        if self.worker.rank:
            self.worker.report(metrics, None)
            return
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), self.model, self.progress)
            self.worker.report(metrics, Path(folder))
        self._checkpoint_seconds += time.perf_counter() - begin


def _set_initial_weights(model: Perceiver, file: Path, config: TrainingConfig) -> None:
    initial = keras.saving.load_model(file, compile=False)
    if [tuple(w.shape) for w in initial.weights] != [tuple(w.shape) for w in model.weights]:
        raise InitialModelError(
            f"train.initial_model = {config.initial_model} is another model than the one to be trained, "
            f"{initial.count_params():,} against {model.count_params():,} parameters: give the model settings with "
            "which it was trained"
        )
    model.set_weights(initial.get_weights())


def _strategy(config: TrainingConfig, worker: Worker) -> tf.distribute.Strategy:
    if worker.num_workers == 1:
        return tf.distribute.get_strategy()
    communication = tf.distribute.experimental.CommunicationImplementation
    implementation = communication.NCCL if config.use_gpu else communication.AUTO
    options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def _state(callback: keras.callbacks.Callback) -> dict[str, float | None]:
    values = {name: getattr(callback, name, None) for name in CALLBACK_STATE if hasattr(callback, name)}
    return {name: None if value is None else float(value) for name, value in values.items()}
