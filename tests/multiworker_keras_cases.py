"""The cases of tests/multiworker_cases.py that show the features of Keras."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from multiworker_setting import (
    ADDRESSES,
    BATCH,
    FIT,
    LOSS,
    RANK,
    ROWS,
    STRATEGY,
    Result,
    X,
    Y,
    case,
    classifier,
    enabled,
    outcome,
    sgd,
    twice,
)

from pipeline import multiworker


@case
def arrays() -> Result:
    model = enabled()
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
    history = model.fit(X, Y, validation_data=(X[:37], Y[:37]), callbacks=[schedule], **FIT)
    evaluated = model.evaluate(X, Y, batch_size=BATCH, verbose=0, return_dict=True)
    predicted = model.predict(X, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(predicted, model(X).numpy(), atol=1e-6)  # all rows, in order
    return outcome(model, history, predicted=predicted, **{f"test_{name}": evaluated[name] for name in evaluated})


@case
def global_dataset() -> Result:
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS, seed=3).batch(BATCH)
    model = enabled()
    return outcome(model, model.fit(dataset, epochs=2, verbose=0))


@case
def shards_of_unequal_length() -> Result:
    """61 and 40 rows in batches of 8: one worker has 8 batches, the other 5."""
    size, first = BATCH // 2, 61
    if len(ADDRESSES) == 1:
        shards = np.split(np.arange(ROWS), [first])
        rows = [np.concatenate([shard[i : i + size] for shard in shards]) for i in range(0, first, size)]
        dataset = tf.data.Dataset.from_generator(
            lambda: ((X[i], Y[i]) for i in rows),
            output_signature=(tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int32)),
        )
    else:
        own = slice(0, first) if RANK == 0 else slice(first, ROWS)
        dataset = tf.data.Dataset.from_tensor_slices((X[own], Y[own])).batch(size)
    data = multiworker.distribute(dataset, STRATEGY)
    model = enabled()
    history = model.fit(data, validation_data=data, epochs=2, verbose=0)
    return outcome(model, history, predicted=model.predict(data, verbose=0))


@case
def early_stopping_and_plateau() -> Result:
    model = enabled()
    callbacks = [
        # The training loss falls, so with mode="max" the first epoch stays the best.
        keras.callbacks.EarlyStopping("loss", mode="max", patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", mode="max", patience=1, factor=0.5),
    ]
    history = model.fit(X, Y, callbacks=callbacks, **(FIT | {"epochs": 5}))
    return outcome(model, history, epochs=len(history.epoch))


@case
def terminate_on_nan() -> Result:
    """A row of the third batch, thus of one worker, has no finite loss."""
    weights = np.ones(ROWS, np.float32)
    weights[2 * BATCH] = np.nan
    steps: list[int] = []
    counter = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    callbacks = [keras.callbacks.TerminateOnNaN(), counter]
    enabled().fit(X, Y, sample_weight=weights, shuffle=False, callbacks=callbacks, **FIT)
    return {"steps": steps}


@case
def steps_per_execution_and_class_weight() -> Result:
    model = enabled(steps_per_execution=3)
    return outcome(model, model.fit(X, Y, class_weight={0: 1.0, 1: 3.0}, **FIT))


@case
def gradient_accumulation_and_clipping() -> Result:
    model = enabled(optimizer=lambda: sgd(gradient_accumulation_steps=2, global_clipnorm=0.1))
    return outcome(model, model.fit(X, Y, **FIT))


@case
def exponential_moving_average() -> Result:
    model = enabled(optimizer=lambda: sgd(use_ema=True, ema_momentum=0.9))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    return outcome(model, model.fit(X, Y, validation_data=(X[:37], Y[:37]), callbacks=[swap], **FIT))


@case
def inputs_outputs_and_sample_weight() -> Result:
    def make() -> keras.Model:
        a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
        hidden = keras.layers.Dense(4, name="hidden")(keras.layers.Add(name="add")([a, b]))
        p = keras.layers.Dense(2, activation="softmax", name="p")(hidden)
        return keras.Model({"a": a, "b": b}, {"p": p, "q": keras.layers.Dense(1, name="q")(hidden)})

    model = enabled(
        make,
        lambda: keras.optimizers.SGD(0.02),
        loss={"p": LOSS, "q": "mse"},
        loss_weights={"p": 1.0, "q": 0.5},
        metrics={"p": ["accuracy"], "q": ["mae"]},
        weighted_metrics={"q": ["mse"]},
    )
    inputs = {"a": X, "b": 2 * X}
    weights = {"p": np.ones(ROWS, np.float32), "q": np.linspace(0, 1, ROWS, dtype=np.float32)}
    history = model.fit(inputs, {"p": Y, "q": X[:, :1]}, sample_weight=weights, **FIT)
    predicted = model.predict(inputs, batch_size=BATCH, verbose=0)
    return outcome(model, history, predicted_p=predicted["p"], predicted_q=predicted["q"])


@case
def batch_normalization() -> Result:
    model = enabled(lambda: classifier(lambda: keras.layers.BatchNormalization(synchronized=True)))
    return outcome(model, model.fit(X, Y, validation_data=(X[:37], Y[:37]), **FIT))


@case
def loss_scaling() -> Result:
    """One worker's gradient of the third batch is infinite: all must skip the step and halve the scale."""
    x = X.copy()
    x[2 * BATCH] = np.inf
    optimizer = keras.optimizers.LossScaleOptimizer
    model = enabled(optimizer=lambda: optimizer(sgd(), initial_scale=256.0, dynamic_growth_steps=3))
    model.fit(x, Y, shuffle=False, **FIT)
    return {f"weights_{i}": value for i, value in enumerate(model.get_weights())} | {
        "scale": model.optimizer.dynamic_scale.numpy(),
        "updates": model.optimizer.iterations.numpy(),
    }


@case
def xla() -> Result:
    model = enabled(jit_compile=True)
    return outcome(model, model.fit(X, Y, **FIT))


@case
def xla_in_mixed_precision() -> Result:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = enabled(lambda: classifier(lambda: keras.layers.Dropout(0.1)), jit_compile=True)
    finally:
        keras.config.set_dtype_policy("float32")
    history = model.fit(X, Y, **(FIT | {"epochs": 3}))
    seeds = [v.numpy() for v in model.variables if v.name == "seed_generator_state"]
    return {"loss": history.history["loss"], "scale": model.optimizer.dynamic_scale.numpy(), "drawn": seeds[0][1]}


class OwnTrainStep(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2, activation="softmax")

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
        )
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss * STRATEGY.num_replicas_in_sync, sample_weight=tf.shape(x)[0])
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


@case
def train_step_of_ones_own() -> Result:
    model = enabled(OwnTrainStep)
    return outcome(model, model.fit(X, Y, **FIT))


@case
def sparse_gradients_and_several_optimizers() -> Result:
    def make() -> keras.Model:
        embedding = keras.layers.Embedding(10, 4, name="embedding")
        return keras.Sequential(
            [
                keras.layers.Input((3,), dtype="int32"),
                embedding,
                keras.layers.Flatten(),
                keras.layers.Dense(2, "softmax"),
            ]
        )

    def optimizer() -> keras.optimizers.Optimizer:
        adam, rest = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, clipnorm=0.05)
        return keras.optimizers.MultiOptimizer(lambda variable: adam if "embedding" in variable.path else rest)

    model = enabled(make, optimizer)
    history = model.fit(np.arange(3 * ROWS).reshape(ROWS, 3) % 10, Y, **FIT)
    return outcome(model, history)


@case
def stop_signal() -> Result:
    """The last worker asks in the second step; all end after the third."""
    stop = multiworker.StopSignal()
    model = enabled(stop=stop)
    seen: list[bool] = []

    def after(batch: int, logs: Any) -> None:
        seen.append(stop.agreed)
        if batch == 1 and RANK == len(ADDRESSES) - 1:
            stop.request()
        model.stop_training = seen[-1]

    model.fit(X, Y, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=after)], **FIT)
    return {"seen": seen}


@case
def refusals() -> Result:
    """The messages; nothing but the one about seeds depends on the other workers."""

    def message(**arguments: Any) -> str:
        try:
            enabled(**arguments).fit(X, Y, **FIT)
        except ValueError as error:
            return str(error)
        return ""

    def unseeded() -> str:
        model = enabled()
        tf.random.set_seed(RANK)
        try:
            model.fit(X, Y, **FIT)
        except ValueError as error:
            return str(error)
        return ""

    def normalized(**arguments: Any) -> Callable[[], keras.Model]:
        return lambda: classifier(lambda: keras.layers.BatchNormalization(name="norm", **arguments))

    return {
        "batch_normalization": message(make=normalized()),
        "xla_batch_normalization": message(make=normalized(synchronized=True), jit_compile=True),
        "xla_train_step": message(make=OwnTrainStep, jit_compile=True),
        "reduction": message(loss=keras.losses.SparseCategoricalCrossentropy(reduction="sum")),
        "seeds": unseeded(),
    }


@case
def dropout_masks() -> Result:
    """Two runs with the same seed, and the mask that each worker draws."""

    def run() -> Result:
        model = enabled(lambda: classifier(lambda: keras.layers.Dropout(0.3)))
        return outcome(model, model.fit(X, Y, **FIT))

    model = enabled(lambda: keras.Sequential([keras.layers.Input((64,)), keras.layers.Dropout(0.5, seed=3)]))
    mask = STRATEGY.run(tf.function(lambda: model(tf.ones((1, 64)), training=True)))
    return twice(run) | {"mask": mask.numpy()}
