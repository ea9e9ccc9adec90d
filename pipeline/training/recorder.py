"""The Keras callback that reports epochs, writes checkpoints and stops a training on request."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from pipeline import multiworker
from pipeline.devices import used_gpus
from pipeline.training import checkpoint
from pipeline.training.checkpoint import TrainingState
from pipeline.training.config import TrainingConfig
from pipeline.training.throughput import StepClock
from pipeline.training.worker import Interrupted, NotFinite, Worker, val_score

CALLBACK_STATE = ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")


class Recorder(keras.callbacks.Callback):
    """Reports epochs and checkpoints, keeps the best weights, and stops the training on request.

    It must be the last of the callbacks, so that a checkpoint has the state of the others after the same epoch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        worker: Worker,
        stop: multiworker.StopSignal,
        progress: TrainingState,
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
        # As if an epoch that continues from a checkpoint had not been cut off.
        self._epoch_start = time.perf_counter() - self.progress.seconds
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
                + (", or compute without XLA (--train.no-jit-compile)" if self.config.jit_compile else "")
            )
        if self.progress.step == self.steps_per_epoch:
            return  # the end of the epoch is about to be reported
        every, stopped = self.config.checkpoint_every_steps, self.stop.agreed
        if stopped or (every and self.progress.step % every == 0):
            self.progress.metrics = checkpoint.metric_values(self.model)
            self.progress.seconds = time.perf_counter() - self._epoch_start
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
            # Of all checkpoints since the last epoch's metrics; the one at the end of this epoch comes later.
            "checkpoint_seconds": self._checkpoint_seconds,
            "num_workers": self.worker.num_workers,
            "num_gpus": used_gpus() * self.worker.num_workers,  # each worker has as many
            "images_per_second": self.clock.images_per_second,
            **self.clock.metrics(),
        }
        self._checkpoint_seconds = 0.0
        if val_score(metrics) <= min(map(val_score, progress.history), default=math.inf):
            progress.best_weights = self.model.get_weights()
        progress.history.append(metrics)
        progress.epoch, progress.step, progress.seconds = epoch + 1, 0, 0.0
        progress.finished = self.model.stop_training or progress.epoch == self.config.epochs
        progress.callbacks = {type(c).__name__: _callback_state(c) for c in self.others}
        if progress.finished and math.isinf(min(map(val_score, progress.history))):
            raise NotFinite(
                f"the validation loss was not finite after any of {progress.epoch} epochs: lower train.learning_rate = "
                f"{self.config.learning_rate}"
                + (", or compute with --train.precision float32" if self.config.precision != "float32" else "")
            )
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


class _NaNIsWorst:
    """Has a callback of Keras take a validation loss of NaN for the worst one; to Keras it is one that none beats."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        super().on_epoch_end(epoch, logs | {"val_loss": val_score(logs)})  # type: ignore[misc]  # the other base class


# By these names a checkpoint knows them.
class EarlyStopping(_NaNIsWorst, keras.callbacks.EarlyStopping):
    pass


class ReduceLROnPlateau(_NaNIsWorst, keras.callbacks.ReduceLROnPlateau):
    pass


def _callback_state(callback: keras.callbacks.Callback) -> dict[str, float | None]:
    """The attributes of a callback that a checkpoint keeps."""
    values = {name: getattr(callback, name, None) for name in CALLBACK_STATE if hasattr(callback, name)}
    return {name: None if value is None else float(value) for name, value in values.items()}
