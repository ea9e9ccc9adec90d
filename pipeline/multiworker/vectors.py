"""Several tensors as one vector, so that one collective operation sends them all."""

from typing import Any

import tensorflow as tf


def widest(values: list[Any]) -> tf.DType:
    """The dtype in which sums of these tensors lose nothing that they had."""
    return tf.float64 if any(value.dtype == tf.float64 for value in values) else tf.float32


def packed(values: list[Any], dtype: tf.DType | None = None) -> tf.Tensor:
    """Concatenates tensors into one vector; of float64 if one of them is, otherwise of float32."""
    dtype = dtype or widest(values)
    return tf.concat([tf.reshape(tf.cast(value, dtype), [-1]) for value in values], axis=0)


def unpacked(vector: tf.Tensor, like: list[Any]) -> list[tf.Tensor]:
    """Splits a vector made by `packed` into tensors with the shapes and dtypes of `like`."""
    shapes = [tuple(value.shape) for value in like]
    sizes = [value.shape.num_elements() for value in map(tf.TensorSpec, shapes)]
    if None in sizes:
        sizes, shapes = [tf.size(value) for value in like], [tf.shape(value) for value in like]
    parts = tf.split(vector, sizes, num=len(like))
    return [
        tf.cast(tf.reshape(part, shape), value.dtype) for part, shape, value in zip(parts, shapes, like, strict=True)
    ]
