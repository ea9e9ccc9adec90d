"""Clipping that always acts, so that a few rows show a step that clips gradients before the workers sum them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from .keras_internals import replaced

# Of the norm that is clipped to. A gradient that is smaller is hardly ever clipped, and may be nothing but rounding.
_LEAST = 1e-4


def _by_global_norm(t_list: Any, clip_norm: Any, use_norm: Any = None, name: str | None = None) -> Any:
    norm = tf.linalg.global_norm(t_list) if use_norm is None else use_norm
    return [None if value is None else _times(value, _factor(norm, clip_norm)) for value in t_list], norm


def _by_norm(t: Any, clip_norm: Any, axes: Any = None, name: str | None = None) -> Any:
    norm = tf.norm(t.values if isinstance(t, tf.IndexedSlices) else t, axis=axes, keepdims=True)
    return _times(t, _factor(tf.squeeze(norm) if axes is None else norm, clip_norm))


@contextlib.contextmanager
def clipping_always() -> Iterator[None]:
    """Within this context TensorFlow gives also smaller tensors the norm that it would clip them to."""
    with replaced(tf, "clip_by_global_norm", _by_global_norm), replaced(tf, "clip_by_norm", _by_norm):
        yield


def _factor(norm: tf.Tensor, clip_norm: Any) -> tf.Tensor:
    limit = tf.cast(clip_norm, norm.dtype)
    return tf.math.divide_no_nan(limit, tf.maximum(norm, _LEAST * limit))


def _times(value: Any, factor: tf.Tensor) -> Any:
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(value.values * tf.cast(factor, value.dtype), value.indices, value.dense_shape)
    return value * tf.cast(factor, value.dtype)
