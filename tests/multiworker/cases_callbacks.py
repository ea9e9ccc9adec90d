"""Callbacks that write or decide"""

import contextlib
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import (
    CROSSENTROPY,
    FIT,
    Result,
    Worker,
    X,
    Y,
    case,
    classifier,
    fitted,
    outcome,
)


def mlp(worker: Worker, **arguments: Any) -> keras.Model:
    return worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"], **arguments)


def written(path: Path) -> Result:
    """The weights that a file contains."""
    model = classifier()
    model.load_weights(path)
    return {f"written {i}": value for i, value in enumerate(model.get_weights())}


@case(slow=False)
def checkpoint_of_weights(worker: Worker) -> Result:
    """`ModelCheckpoint(save_weights_only=True, save_best_only=True)` with one path for all workers"""
    path = worker.folder / "best.weights.h5"
    save = keras.callbacks.ModelCheckpoint(path, "val_loss", save_weights_only=True, save_best_only=True)
    result = fitted(mlp(worker), X, Y, validation_data=(X[:37], Y[:37]), callbacks=[save], epochs=4)
    return result | written(path)


@case()
def checkpoint_of_the_model(worker: Worker) -> Result:
    """`ModelCheckpoint` of the whole model in every epoch, with one path for all workers"""
    save = keras.callbacks.ModelCheckpoint(worker.folder / "model.keras")
    result = fitted(mlp(worker), X, Y, callbacks=[save], epochs=4)
    loaded = keras.saving.load_model(worker.folder / "model.keras")
    return result | {f"written {i}": value for i, value in enumerate(loaded.get_weights())}


@case()
def backup_and_restore(worker: Worker) -> Result:
    """`BackupAndRestore` with one folder for all workers: `fit` is interrupted and called again"""
    backup = worker.folder / "backup"

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        mlp(worker).fit(
            X, Y, callbacks=[keras.callbacks.BackupAndRestore(backup), Interrupt()], **(FIT | {"epochs": 4})
        )
    keras.utils.set_random_seed(2)
    model = mlp(worker)
    history = model.fit(X, Y, callbacks=[keras.callbacks.BackupAndRestore(backup)], **(FIT | {"epochs": 5}))
    return outcome(model, history.history, epochs=history.epoch)


@case()
def csv_logger(worker: Worker) -> Result:
    """`CSVLogger` with one file for all workers"""
    path = worker.folder / "log.csv"
    result = fitted(mlp(worker), X, Y, callbacks=[keras.callbacks.CSVLogger(path)], epochs=3)
    lines = path.read_text().splitlines()
    return result | {"lines": len(lines), "last": [float(value) for value in lines[-1].split(",") if value != "NA"]}


@case()
def checkpoint_in_every_few_batches(worker: Worker) -> Result:
    """`ModelCheckpoint(save_freq=3)`, a path with the epoch's number"""
    save = keras.callbacks.ModelCheckpoint(
        str(worker.folder / "{epoch}.weights.h5"), save_weights_only=True, save_freq=3
    )
    result = fitted(mlp(worker), X, Y, callbacks=[save])
    return result | {"files": len(list(worker.folder.glob("*.weights.h5")))}


@case()
def early_stopping_and_plateau(worker: Worker) -> Result:
    """EarlyStopping with `restore_best_weights`, ReduceLROnPlateau, LearningRateScheduler"""
    callbacks = [
        # The training loss falls, so with mode="max" the first epoch stays the best.
        keras.callbacks.EarlyStopping("loss", mode="max", patience=3, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", mode="max", patience=1, factor=0.5),
    ]
    result = fitted(mlp(worker), X, Y, callbacks=callbacks, epochs=6)
    assert len(result["loss"]) == 4
    np.testing.assert_allclose(result["learning_rate"], [0.1, 0.1, 0.05, 0.025], rtol=1e-6)
    return result


@case()
def learning_rate_schedules(worker: Worker) -> Result:
    """LearningRateScheduler"""
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
    return fitted(mlp(worker), X, Y, callbacks=[schedule])


@case()
def exponential_moving_average(worker: Worker) -> Result:
    """SwapEMAWeights and `use_ema`"""
    optimizer = lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)  # noqa: E731
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    return fitted(mlp(worker, optimizer=optimizer), X, Y, validation_data=(X[:37], Y[:37]), callbacks=[swap])


@case(learns=False)
def terminate_on_nan(worker: Worker) -> Result:
    """TerminateOnNaN, where the rows of one worker have the NaN"""
    weights = np.ones(len(X), np.float32)
    weights[2 * FIT["batch_size"]] = np.nan
    steps: list[int] = []
    counter = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    callbacks = [keras.callbacks.TerminateOnNaN(), counter]
    mlp(worker).fit(X, Y, sample_weight=weights, shuffle=False, callbacks=callbacks, **FIT)
    assert steps == [0, 1, 2]
    return {"steps": steps}


@case()
def callback_of_ones_own_that_evaluates(worker: Worker) -> Result:
    """a callback that calls `evaluate` and `predict` on all workers"""
    seen: list[float] = []

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(self.model.evaluate(X[:37], Y[:37], batch_size=16, verbose=0)[0])
            seen.append(float(self.model.predict(X[:37], batch_size=16, verbose=0)[3, 0]))

    result = fitted(mlp(worker), X, Y, callbacks=[Evaluate()])
    return result | {"seen": seen}


@case()
def files_of_ones_own_on_the_chief(worker: Worker) -> Result:
    """a callback that saves on rank 0 alone"""
    path = worker.folder / "own.weights.h5"

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if worker.rank == 0:
                self.model.save_weights(path)

    result = fitted(mlp(worker), X, Y, callbacks=[Save()])
    assert worker.rank or os.path.getsize(path)
    return result


@case()
def list_of_callbacks(worker: Worker) -> Result:
    """`CallbackList` of a `ModelCheckpoint` and a `CSVLogger`, each with one path for all workers"""
    model, path, table = mlp(worker), worker.folder / "last.weights.h5", worker.folder / "log.csv"
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    callbacks = keras.callbacks.CallbackList([save, keras.callbacks.CSVLogger(table)], add_history=True, model=model)
    model.fit(X, Y, callbacks=callbacks, **FIT)
    assert len(callbacks.callbacks) == 3
    return outcome(model, model.history.history, lines=len(table.read_text().splitlines())) | written(path)


@case("the workers have different learning rates.*LearningRateScheduler")
def learning_rate_schedule_on_one_rank(worker: Worker) -> Result:
    """LearningRateScheduler on rank 0 alone"""
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.1 if epoch else rate)
    return fitted(mlp(worker), X, Y, callbacks=[schedule] if worker.rank == 0 else [])


@case("the workers have different learning rates.*LearningRateScheduler")
def learning_rate_of_one_of_several_optimizers(worker: Worker) -> Result:
    """the same with one of several optimizers, which a model has in a dict"""

    class Halves(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)
            self.optimizers = {"hidden": keras.optimizers.Adam(0.01), "last": [keras.optimizers.SGD(0.1)]}

        def call(self, x: Any) -> Any:
            return self.last(self.hidden(x))

        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = self.compute_loss(y=y, y_pred=self(x))
            (last,) = self.optimizers["last"]
            for optimizer, layer in ((self.optimizers["hidden"], self.hidden), (last, self.last)):
                weights = layer.trainable_weights
                optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"step_loss": loss}

    def set_rate(step: int, logs: Any) -> None:
        if step == 2 and worker.rank == 0:
            model.optimizers["last"][0].learning_rate = 0.01

    from_logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = worker.compiled(Halves, from_logits)
    return fitted(model, X, Y, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=set_rate)])


@case("the workers have different weights: .*kernel")
def weights_that_one_rank_sets_between_two_calls(worker: Worker) -> Result:
    """weights that rank 0 alone sets between two calls of `fit`"""
    model = mlp(worker)
    first = fitted(model, X, Y)
    if worker.rank == 0:
        model.set_weights([2 * weight for weight in model.get_weights()])
    return first | {f"again {name}": value for name, value in fitted(model, X, Y).items()}
