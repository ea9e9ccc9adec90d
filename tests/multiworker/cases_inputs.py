"""Inputs that are no dense numbers"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import BATCH, CROSSENTROPY, ROWS, Result, Worker, X, Y, case, fitted
from cases_steps import SimpleStep

WORDS = np.array(["red green", "blue", "green blue red", "black"])[np.arange(ROWS) % 4][:, None]
CLASSES = (np.arange(ROWS) % 4 == 0).astype(np.int32)


@case()
def strings(worker: Worker) -> Result:
    """texts that a TextVectorization in the model divides into words"""

    def make() -> keras.Model:
        words = keras.layers.TextVectorization(output_mode="multi_hot", vocabulary=["red", "green", "blue", "black"])
        text = keras.Input((1,), dtype="string")
        return keras.Model(text, keras.layers.Dense(2, "softmax")(words(text)))

    data = tf.data.Dataset.from_tensor_slices((WORDS, CLASSES)).batch(BATCH)
    return fitted(worker.compiled(make, CROSSENTROPY, metrics=["accuracy"]), data)


@case()
def sparse_inputs(worker: Worker) -> Result:
    """sparse tensors as inputs, in a `tf.data.Dataset`"""
    make = lambda: keras.Sequential([keras.Input((4,), sparse=True), keras.layers.Dense(2, "softmax")])  # noqa: E731
    data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(np.where(X > 0, X, 0)), Y)).batch(BATCH)
    return fitted(worker.compiled(make, CROSSENTROPY), data)


class Nested(SimpleStep):
    """A model with nested inputs and outputs."""

    def call(self, x: Any, training: bool = False) -> Any:
        (one, two), three = x["pair"], x["more"]["three"]
        return self.last(self.hidden(one) + self.hidden(two) * self.hidden(three))

    def predict_step(self, data: Any) -> Any:
        (x,) = data
        return {"y": self(x), "inputs": (x["pair"][0], [x["pair"][1]])}


@case()
def nested_inputs(worker: Worker) -> Result:
    """nested inputs, and nested outputs in `predict`"""
    model = worker.compiled(Nested, "mse")
    inputs = {"pair": (X, 2 * X), "more": {"three": X + 1}}
    found = fitted(model, tf.data.Dataset.from_tensor_slices((inputs, X[:, :1])).batch(BATCH))
    predicted = model.predict(tf.data.Dataset.from_tensor_slices((inputs,)).batch(BATCH), verbose=0)
    outputs = {"y": predicted["y"], "first": predicted["inputs"][0], "second": predicted["inputs"][1][0]}
    return found | outputs
