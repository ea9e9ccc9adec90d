"""The precision in which the check computes a step."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class _InFloat64(keras.DTypePolicy):
    """Variables as they are, computations in float64."""

    @property
    def compute_dtype(self) -> str:
        return "float64"


@contextlib.contextmanager
def computing_in_float64(model: keras.Model) -> Iterator[None]:
    """Lets layers, and what takes the default of Keras, compute in float64."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        # Layers of preprocessing may compute in integers.
        floating = [layer for layer in model._flatten_layers() if tf.as_dtype(layer.compute_dtype).is_floating]
        with _policies(floating, _InFloat64):
            yield
    finally:
        keras.config.set_floatx(floatx)


@contextlib.contextmanager
def computing_in_the_type_of_variables(model: keras.Model) -> Iterator[None]:
    """Lets layers of mixed precision compute in the type of their variables."""
    mixed = [layer for layer in model._flatten_layers() if layer.compute_dtype != layer.variable_dtype]
    with _policies(mixed, keras.DTypePolicy):
        yield


@contextlib.contextmanager
def _policies(layers: list[keras.Layer], make: type[keras.DTypePolicy]) -> Iterator[None]:
    before = [layer.dtype_policy for layer in layers]
    for layer in layers:
        layer.dtype_policy = make(layer.variable_dtype)
    try:
        yield
    finally:
        for layer, policy in zip(layers, before, strict=True):
            layer.dtype_policy = policy


def in_float64(batch: Any) -> Any:
    """The batch with its floating-point numbers in float64."""

    def wide(value: Any) -> Any:
        return tf.cast(value, tf.float64) if value is not None and value.dtype.is_floating else value

    return tf.nest.map_structure(wide, batch)


def rounded_otherwise(value: tf.Tensor, number: int) -> tf.Tensor:
    """Moves each floating-point number to one of its neighbours, by chance; `number` is that of the trial."""
    epsilon = tf.experimental.numpy.finfo(value.dtype.as_numpy_dtype).eps
    signs = np.random.default_rng(number).choice([-1.0, 1.0], size=value.shape)
    return value * (1 + tf.cast(signs * epsilon, value.dtype))
