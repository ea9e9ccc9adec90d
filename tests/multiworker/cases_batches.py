"""Batches of other forms, and single batches"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import BATCH, ROWS, Result, T, Worker, X, case, dataset, fitted, outcome
from cases_steps import Guided
from keras import ops


@case()
def four_tuples(worker: Worker) -> Result:
    """batches of four tensors for a `train_step` of one's own"""

    class Pairs(Guided):
        def train_step(self, data: Any) -> Any:
            a, b, y, weight = data
            with tf.GradientTape() as tape:
                loss = ops.mean(weight * ops.square(self(a)[:, 0] - self(b)[:, 0] - y[:, 0]))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"step_loss": loss}

    def make() -> keras.Model:
        model = Pairs()
        model.build((None, 4))
        return model

    weight = np.linspace(0.5, 1.5, ROWS, dtype=np.float32)
    return fitted(worker.compiled(make), dataset(X, X[::-1], T, weight))


@case()
def dicts_of_tensors(worker: Worker) -> Result:
    """batches that are dicts for a `train_step` of one's own"""

    class Named(Guided):
        def train_step(self, data: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(self(data["x"]) - data["y"]))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"step_loss": loss}

    def make() -> keras.Model:
        model = Named()
        model.build((None, 4))
        return model

    data = tf.data.Dataset.from_tensor_slices({"x": X, "y": T}).batch(BATCH)
    return fitted(worker.compiled(make), data)


@case()
def batches_of_ones_own(worker: Worker) -> Result:
    """`train_on_batch`, `test_on_batch` and `predict_on_batch`"""
    model = worker.compiled(Guided, "mse", metrics=["mae"])
    losses = [model.train_on_batch(X[i : i + 15], T[i : i + 15]) for i in (0, 30, 0, 45, 60, 0)]
    return outcome(
        model,
        {"loss": np.asarray(losses)[:, 0], "mae": np.asarray(losses)[:, 1]},
        tested=model.test_on_batch(X[:31], T[:31]),
        predicted=model.predict_on_batch(X[:31]),
    )


@case(learns=False)
def predict_on_batch(worker: Worker) -> Result:
    """`predict_on_batch` of an odd number of rows"""
    model = worker.compiled(Guided, "mse")
    model.build((None, 4))
    return {"predicted": model.predict_on_batch(X[:31])}


@case()
def predict_step_of_ones_own(worker: Worker) -> Result:
    """a `predict_step` that returns a dict"""

    class Named(Guided):
        def predict_step(self, data: Any) -> Any:
            y_pred = self(data, training=False)
            return {"mean": y_pred, "size": ops.abs(y_pred)}

    model = worker.compiled(Named, "mse")
    result = fitted(model, X, T)
    predicted = model.predict(X, batch_size=BATCH, verbose=0)
    return result | {f"predicted {name}": value for name, value in predicted.items()}


class BuiltInItsStep(keras.Model):
    """The batches of its `train_step` are not those of its `call`, and its layers have no weights before."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.out(self.hidden(x))

    def train_step(self, data: Any) -> Any:
        first, second, target = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(self(keras.ops.concatenate([first, second], -1)) - target))
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_weights), self.trainable_weights, strict=True)
        )
        return {"step_loss": loss}  # Keras would log its own tracker as "loss"


@case()
def weights_that_are_made_in_the_step(worker: Worker) -> Result:
    """weights that a `train_step` of one's own makes in its first call"""
    return fitted(worker.compiled(BuiltInItsStep), dataset(X[:96, :2], X[:96, 2:], T[:96], size=8))


@case()
def weights_that_are_made_in_the_step_unchecked(worker: Worker) -> Result:
    """the same with `enable(model, check=False)`"""
    model = worker.compiled(BuiltInItsStep, enable={"check": False})
    return fitted(model, dataset(X[:96, :2], X[:96, 2:], T[:96], size=8))


@case(learns=False, slow=False)
def predict_several_rows_for_each(worker: Worker) -> Result:
    """`predict` of a model that gives a row for each step of each sequence"""

    def make() -> keras.Model:
        sequences = keras.Input((5, 4))
        steps = keras.layers.Lambda(lambda x: tf.reshape(x, [-1, 4]))(sequences)
        return keras.Model(sequences, [steps, keras.layers.Flatten()(sequences)])

    x = np.random.default_rng(3).normal(size=(21, 5, 4)).astype(np.float32)
    steps, whole = worker.compiled(make, "mse").predict(x, batch_size=8, verbose=0)
    np.testing.assert_array_equal(steps, x.reshape(-1, 4))
    return {"steps": steps, "whole": whole}


@case(learns=False, slow=False)
def predict_other_types(worker: Worker) -> Result:
    """`predict` of bfloat16, as with mixed precision, and of bool, small integers, complex numbers and strings"""
    types = ("bfloat16", "float16", "bool", "uint8", "int16", "uint32", "int64", "uint64", "complex64")

    class Typed(keras.Model):
        def call(self, x: Any) -> Any:
            return x

        def predict_step(self, data: Any) -> Any:
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            found = {name: tf.cast(tf.abs(x) * 9, name) for name in types}
            return found | {"string": tf.strings.as_string(x) + "\u00e4"}

    predicted = worker.compiled(Typed, "mse").predict(X, batch_size=BATCH, verbose=0)
    for name in types:
        np.testing.assert_array_equal(predicted[name], tf.cast(tf.abs(X) * 9, name).numpy(), err_msg=name)
        assert predicted[name].dtype == tf.as_dtype(name).as_numpy_dtype, name
    np.testing.assert_array_equal(predicted["string"], (tf.strings.as_string(X) + "\u00e4").numpy())
    return {"rows": len(predicted["bool"])}


class Statistics(keras.Model):
    """A model that predicts a number of the batch, and some numbers for each batch."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def call(self, x: Any) -> Any:
        return tf.reshape(x, [-1])[: self.numbers]


@case("neither a row for each row of the batch")
def predict_other_rows(worker: Worker) -> Result:
    """`predict` of a model that gives a number for the batch"""
    return {"predicted": worker.compiled(lambda: Statistics(1), "mse").predict(X, batch_size=BATCH, verbose=0)}


@case("neither a row for each row of the batch")
def predict_as_many_rows_for_any_batch(worker: Worker) -> Result:
    """`predict` of a model that gives as many numbers for a batch of any size"""
    model = worker.compiled(lambda: Statistics(5), "mse")
    return {"predicted": model.predict(X, batch_size=BATCH, verbose=0)}


@case()
def ragged_inputs(worker: Worker) -> Result:
    """ragged tensors as inputs"""

    class Means(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.dense.build((None, 1))
            self.built = True

        def call(self, x: Any) -> Any:
            return self.dense(tf.reduce_mean(x, axis=1, keepdims=True))

    lengths = np.arange(ROWS) % 3 + 1
    rows = tf.RaggedTensor.from_row_lengths(np.linspace(0, 1, lengths.sum(), dtype=np.float32), lengths)
    data = tf.data.Dataset.from_tensor_slices((rows, T)).batch(BATCH)
    return fitted(worker.compiled(Means, "mse", lambda: keras.optimizers.SGD(0.05)), data)
