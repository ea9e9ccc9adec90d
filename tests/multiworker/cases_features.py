"""Features of `compile` and of `enable`"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import (
    BATCH,
    CROSSENTROPY,
    FIT,
    ROWS,
    Result,
    T,
    Worker,
    X,
    Y,
    case,
    classifier,
    dataset,
    fitted,
    outcome,
    regressor,
)

from pipeline import multiworker


def mlp(worker: Worker, *middle: Any, **arguments: Any) -> keras.Model:
    return worker.compiled(lambda: classifier(*middle), CROSSENTROPY, metrics=["accuracy"], **arguments)


def sgd(**arguments: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9, **arguments)


@case(workers=(2, 3), slow=False)
def arrays(worker: Worker) -> Result:
    """arrays in `fit`, `evaluate` and `predict`"""
    model = mlp(worker)
    result = fitted(model, X, Y, validation_data=(X[:37], Y[:37]))
    predicted = model.predict(X, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(predicted, model(X).numpy(), atol=1e-6)  # all rows, in order
    return result | {"predicted": predicted, "evaluated": model.evaluate(X, Y, batch_size=BATCH, verbose=0)}


@case()
def shards_of_unequal_length(worker: Worker) -> Result:
    """`distribute` of shards of unequal length: one worker has 8 batches, the other 5"""
    size, first = BATCH // 2, 61
    if worker.num_workers == 1:
        shards = np.split(np.arange(ROWS), [first])
        rows = [np.concatenate([shard[i : i + size] for shard in shards]) for i in range(0, first, size)]
        data = tf.data.Dataset.from_generator(
            lambda: ((X[i], Y[i]) for i in rows),
            output_signature=(tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int32)),
        )
    else:
        own = slice(0, first) if worker.rank == 0 else slice(first, ROWS)
        data = dataset(X[own], Y[own], size=size)
    batches = worker.distribute(data)
    model = mlp(worker)
    result = fitted(model, batches, validation_data=batches)
    return result | {"predicted": model.predict(batches, verbose=0)}


@case(slow=False)
def gradient_accumulation_and_clipping(worker: Worker) -> Result:
    """`gradient_accumulation_steps=2` and `global_clipnorm`"""
    return fitted(
        mlp(worker, optimizer=lambda: sgd(gradient_accumulation_steps=2, global_clipnorm=0.1)), X, Y, epochs=3
    )


@case()
def clipping_by_norm_and_by_value(worker: Worker) -> Result:
    """`clipnorm`, then `clipvalue`"""
    model = mlp(worker, optimizer=lambda: sgd(clipnorm=0.05))
    first = fitted(model, X, Y)
    with worker.strategy.scope():
        model.compile(sgd(clipvalue=0.01), CROSSENTROPY)
    return first | {f"again {name}": value for name, value in fitted(model, X, Y).items()}


@case()
def inputs_and_outputs_by_name(worker: Worker) -> Result:
    """several inputs and outputs, with losses, metrics and sample weights by name"""

    def make() -> keras.Model:
        a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
        hidden = keras.layers.Dense(4, name="hidden")(keras.layers.Add(name="add")([a, b]))
        p = keras.layers.Dense(2, activation="softmax", name="p")(hidden)
        return keras.Model({"a": a, "b": b}, {"p": p, "q": keras.layers.Dense(1, name="q")(hidden)})

    model = worker.compiled(
        make,
        {"p": CROSSENTROPY, "q": "mse"},
        lambda: keras.optimizers.SGD(0.02),
        loss_weights={"p": 1.0, "q": 0.5},
        metrics={"p": ["accuracy"], "q": ["mae"]},
        weighted_metrics={"q": ["mse"]},
    )
    inputs = {"a": X, "b": 2 * X}
    weights = {"p": np.ones(ROWS, np.float32), "q": np.linspace(0, 1, ROWS, dtype=np.float32)}
    result = fitted(model, inputs, {"p": Y, "q": X[:, :1]}, sample_weight=weights)
    predicted = model.predict(inputs, batch_size=BATCH, verbose=0)
    return result | {f"predicted {name}": value for name, value in predicted.items()}


@case()
def loss_scaling(worker: Worker) -> Result:
    """LossScaleOptimizer, where the gradient of one worker is infinite: all skip the step and halve the scale"""
    x = X.copy()
    x[2 * BATCH] = np.inf
    scaling = keras.optimizers.LossScaleOptimizer
    optimizer = lambda: scaling(sgd(), initial_scale=256.0, dynamic_growth_steps=3)  # noqa: E731
    model = mlp(worker, optimizer=optimizer)
    model.fit(x, Y, shuffle=False, **FIT)
    updates = model.optimizer.iterations.numpy()
    assert updates == 12  # of 14 steps: one in each epoch is skipped
    return outcome(model, fitted(model, X, Y), scale=model.optimizer.dynamic_scale.numpy(), updates=updates)


class OwnTrainStep(keras.Model):
    """A model with a `train_step` of its own."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = keras.layers.BatchNormalization(synchronized=True) if norm else keras.layers.Identity()
        self.dense = keras.layers.Dense(2, activation="softmax")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.dense(self.norm(x, training=training))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=tf.shape(x)[0])
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


@case()
def train_step_with_a_weighted_tracker(worker: Worker) -> Result:
    """a `train_step` that weights its loss tracker by rows"""
    return fitted(worker.compiled(OwnTrainStep, CROSSENTROPY, metrics=["accuracy"]), X, Y)


@case()
def train_step_and_synchronized_batch_normalization(worker: Worker) -> Result:
    """a `train_step` of one's own, synchronized BatchNormalization, and an uneven last batch"""
    model = worker.compiled(lambda: OwnTrainStep(norm=True), CROSSENTROPY, metrics=["accuracy"])
    return fitted(model, X[:91], Y[:91])


@case("OwnTrainStep has a train_step of its own.*compute_loss")
def xla_and_a_train_step(worker: Worker) -> Result:
    """a `train_step` of one's own with `jit_compile=True`"""
    model = worker.compiled(OwnTrainStep, CROSSENTROPY, jit_compile=worker.num_workers > 1)
    return fitted(model, X, Y)


@case(stock=False)
def sparse_gradients_and_several_optimizers(worker: Worker) -> Result:
    """Embedding with Adam, the rest with SGD, by `MultiOptimizer`"""

    def make() -> keras.Model:
        layers = keras.layers
        embedding = layers.Embedding(10, 4, name="embedding")
        return keras.Sequential(
            [layers.Input((3,), dtype="int32"), embedding, layers.Flatten(), layers.Dense(2, "softmax")]
        )

    def optimizer() -> keras.optimizers.Optimizer:
        adam, rest = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, clipnorm=0.05)
        return keras.optimizers.MultiOptimizer(lambda variable: adam if "embedding" in variable.path else rest)

    model = worker.compiled(make, CROSSENTROPY, optimizer, metrics=["accuracy"])
    return fitted(model, np.arange(3 * ROWS).reshape(ROWS, 3) % 10, Y)


@case()
def other_optimizers(worker: Worker) -> Result:
    """Muon, Lion, Adafactor and RMSprop, one after another"""
    results: Result = {}
    for name, optimizer in (
        ("muon", lambda: keras.optimizers.Muon(0.01)),
        ("lion", lambda: keras.optimizers.Lion(1e-3)),
        ("adafactor", lambda: keras.optimizers.Adafactor(0.01)),
        ("rmsprop", lambda: keras.optimizers.RMSprop(0.01)),
    ):
        keras.utils.set_random_seed(1)
        make = lambda: keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(1)])  # noqa: E731
        results |= {
            f"{name} {key}": value for key, value in fitted(worker.compiled(make, "mse", optimizer), X, T).items()
        }
    return results


@case(stock=False, learns=False)
def stop_signal(worker: Worker) -> Result:
    """`StopSignal`: the last worker asks in the second step, all end after the third"""
    stop = multiworker.StopSignal()
    model = mlp(worker, enable={"stop": stop})
    seen: list[bool] = []

    def after(batch: int, logs: Any) -> None:
        seen.append(stop.agreed)
        if batch == 1 and worker.rank == worker.num_workers - 1:
            stop.request()
        model.stop_training = seen[-1]

    model.fit(X, Y, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=after)], **FIT)
    assert seen == [False, False, True]
    return {"seen": seen}


@case(slow=False, learns=False, stock=False)
def dropout(worker: Worker) -> Result:
    """dropout: other masks on every worker, and the same weights in every run with as many workers"""
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        model = mlp(worker, lambda: keras.layers.Dropout(0.3))
        runs.append(fitted(model, X, Y))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][name], err_msg=name)
    assert abs(runs[0]["loss"][0] - runs[0]["loss"][1]) > 1e-3

    class Masks(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.drop = keras.layers.Dropout(0.5, seed=3)

        def call(self, x: Any) -> Any:
            return self.drop(x, training=True)

    # Each worker predicts one row of ones.
    masks = worker.compiled(Masks, "mse").predict(np.ones((worker.num_workers, 64)), verbose=0)
    assert all(0.2 < np.mean(mask > 0) < 0.8 for mask in masks)
    assert len({mask.tobytes() for mask in masks}) == worker.num_workers
    return {"repeated": True}


@case(learns=False)
def memory_of_many_steps(worker: Worker) -> Result:
    """3,000 steps: the memory of a process does not grow by more than 0.5 kB a step"""
    model = worker.compiled(regressor, "mse")
    data = tf.data.Dataset.from_tensors((X[:BATCH], T[:BATCH])).repeat()
    memory: dict[int, int] = {}

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch in (1000, 2999):
                memory[batch] = resident()

    model.fit(data, steps_per_epoch=3000, verbose=0, callbacks=[Watch()])
    grown = (memory[2999] - memory[1000]) / 1999
    assert grown < 500, f"{grown:.0f} bytes a step"
    return {"flat": True}


def resident() -> int:
    """Bytes of memory that this process holds, files left out."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@case(learns=False, stock=False)
def bfloat16_gradients_after_freezing(worker: Worker) -> Result:
    """`gradient_dtype="bfloat16"`, and a layer that is frozen before another `compile`"""
    model = mlp(worker, enable={"gradient_dtype": "bfloat16"})
    losses = fitted(model, X, Y)["loss"]
    model.layers[0].trainable = False
    with worker.strategy.scope():
        model.compile(sgd(), CROSSENTROPY)
    before = model.layers[0].get_weights()[0]
    losses += fitted(model, X, Y)["loss"]
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], before)
    return {"losses": np.round(losses, 2), "falls": losses[-1] < losses[0]}
