"""Random numbers that are constants, so that a step can be repeated with other parts of a batch."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .keras_internals import random_module, replaced, tf_random_module


def _of_rows(shape: Any, low: float, high: float, dtype: Any) -> tf.Tensor:
    """Numbers from `low` to `high` that are the same in all rows and differ within a row."""
    shape = tf.cast(shape, tf.int32) if not isinstance(shape, int) else tf.constant([shape])
    dtype = tf.as_dtype(dtype or tf.float32)
    size = tf.reduce_prod(shape[1:])
    ramp = (tf.range(size, dtype=tf.float32) + 0.5) / tf.cast(size, tf.float32)
    row = tf.cast(low + ramp * (high - low), dtype)
    return tf.broadcast_to(tf.reshape(row, tf.concat([tf.ones_like(shape[:1]), shape[1:]], 0)), shape)


def _normal(shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = None, **_: Any) -> tf.Tensor:
    dtype = tf.as_dtype(dtype or tf.float32)
    return _of_rows(shape, -1.0, 1.0, dtype) * tf.cast(stddev, dtype) + tf.cast(mean, dtype)


def _uniform(shape: Any, minval: Any = 0, maxval: Any = None, dtype: Any = None, **_: Any) -> tf.Tensor:
    dtype = tf.as_dtype(dtype or tf.float32)
    low = tf.cast(minval, tf.float32)
    high = tf.constant(1.0) if maxval is None else tf.cast(maxval, tf.float32)
    return tf.cast(_of_rows(shape, 0.0, 1.0, tf.float32) * (high - low) + low, dtype)


def _categorical(logits: Any, num_samples: int, dtype: Any = "int64", **_: Any) -> tf.Tensor:
    return tf.zeros([tf.shape(logits)[0], num_samples], tf.as_dtype(dtype))


def _dropout(inputs: Any, rate: Any, noise_shape: Any = None, seed: Any = None) -> Any:
    return inputs


def _shuffle(x: Any, axis: int = 0, seed: Any = None) -> Any:
    return x


def _gamma(shape: Any, alpha: Any, *_: Any, dtype: Any = None, **__: Any) -> tf.Tensor:
    return _of_rows(shape, 0.5, 1.5, dtype) * tf.cast(alpha, tf.as_dtype(dtype or tf.float32))


def _binomial(shape: Any, counts: Any, probabilities: Any, dtype: Any = None, seed: Any = None) -> tf.Tensor:
    dtype = tf.as_dtype(dtype or tf.float32)
    return tf.zeros(shape, dtype) + tf.cast(tf.round(counts * probabilities), dtype)


def _beta(shape: Any, alpha: Any, beta: Any, dtype: Any = None, seed: Any = None) -> tf.Tensor:
    dtype = tf.as_dtype(dtype or tf.float32)
    return tf.zeros(shape, dtype) + tf.cast(alpha, dtype) / tf.cast(alpha + beta, dtype)


_Functions = dict[str, Callable[..., Any]]
# The functions to which those of keras.random and tf.random lead.
_OF_KERAS: _Functions = {
    "normal": _normal,
    "truncated_normal": _normal,
    "uniform": _uniform,
    "randint": _uniform,
    "categorical": _categorical,
    "dropout": _dropout,
    "shuffle": _shuffle,
    "gamma": _gamma,
    "binomial": _binomial,
    "beta": _beta,
}
_OF_TENSORFLOW: _Functions = {
    "random_normal": _normal,
    "truncated_normal": _normal,
    "random_uniform": _uniform,
    "random_shuffle": lambda value, seed=None, name=None: value,
}
_IN_TF_RANDOM: _Functions = {
    "normal": _normal,
    "truncated_normal": _normal,
    "uniform": _uniform,
    "shuffle": lambda value, seed=None, name=None: value,
    "stateless_normal": lambda shape, seed, *args, **kwargs: _normal(shape, *args, **kwargs),
    "stateless_truncated_normal": lambda shape, seed, *args, **kwargs: _normal(shape, *args, **kwargs),
    "stateless_uniform": lambda shape, seed, *args, **kwargs: _uniform(shape, *args, **kwargs),
}


@contextlib.contextmanager
def constant_randomness() -> Iterator[list[tuple[keras.Variable, np.ndarray]]]:
    """Within this context random numbers are constants that do not depend on the number of rows.

    Variables that are created within it get the values that they would get without it.

    Yields:
        A list to which each of these variables is added, with its initial value in this process.
    """
    created: list[tuple[keras.Variable, np.ndarray]] = []
    creating = threading.local()

    def outside_creation(drawn: Callable[..., Any], constant: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (drawn if hasattr(creating, "layer") else constant)(*args, **kwargs)

    def noting(create: Callable[..., keras.Variable]) -> Callable[..., keras.Variable]:
        def created_in(owner: Any, *args: Any, **kwargs: Any) -> keras.Variable:
            with replaced(creating, "layer", owner):
                variable = create(owner, *args, **kwargs)
            if tf.executing_eagerly():  # otherwise it gets its value later
                created.append((variable, tf.identity(variable.value).numpy()))
            return variable

        return created_in

    def noting_later(initialize: Callable[[keras.Variable], None]) -> Callable[[keras.Variable], None]:
        def initialized(variable: keras.Variable) -> None:
            with replaced(creating, "layer", variable):
                initialize(variable)
            created.append((variable, tf.identity(variable.value).numpy()))

        return initialized

    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    with contextlib.ExitStack() as stack:
        for owner, functions in (
            (random_module, _OF_KERAS),
            (tf_random_module, _OF_TENSORFLOW),
            (tf.random, _IN_TF_RANDOM),
        ):
            for name, function in functions.items():
                stack.enter_context(replaced(owner, name, outside_creation(getattr(owner, name), function)))
        stack.enter_context(replaced(keras.Layer, "add_weight", noting(keras.Layer.add_weight)))
        stack.enter_context(
            replaced(keras.Variable, "_deferred_initialize", noting_later(keras.Variable._deferred_initialize))
        )
        stack.enter_context(replaced(keras.metrics.Metric, "add_variable", noting(keras.metrics.Metric.add_variable)))
        try:
            yield created
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
