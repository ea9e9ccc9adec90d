"""Predictions of any dtype arrive as they were sent, and only those of rows that count are sent."""

import numpy as np
import pytest
import tensorflow as tf

from pipeline.multiworker.predictions import received, rows_that_count, sent

TYPES = ("bfloat16", "float16", "float64", "bool", "uint8", "int8", "uint16", "int16", "uint32", "int64", "complex64")
COLLECTIVE = (tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)
"""The dtypes that TensorFlow gathers."""


@pytest.mark.parametrize("name", TYPES)
def test_a_dtype_is_kept(name: str) -> None:
    value = tf.cast(tf.constant([[1.5, 200.0], [0.0, 77.25]]), name)
    parts = sent(value)
    assert all(part.dtype in COLLECTIVE for part in parts)
    assert received(parts, value.dtype).dtype == value.dtype
    np.testing.assert_array_equal(received(parts, value.dtype).numpy(), value.numpy())


def test_large_integers_are_exact() -> None:
    value = tf.constant([2**64 - 1, 2**63 + 1, 5], tf.uint64)
    np.testing.assert_array_equal(received(sent(value), tf.uint64).numpy(), value.numpy())


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_strings_may_have_any_bytes(shape: tuple[int, ...]) -> None:
    value = tf.reshape(tf.constant([b"a", b"", "äö".encode(), b"\x00b", b"\xff\xfe", b"c"]), shape)
    parts = sent(value)
    assert all(part.dtype in COLLECTIVE for part in parts)
    np.testing.assert_array_equal(received(parts, tf.string).numpy(), value.numpy())
    assert received(sent(value[:0]), tf.string).shape == (0, *shape[1:])


@pytest.mark.parametrize(
    ("size", "rows", "given", "kept", "misfits"), [(3, 3, 3, 3, 0), (12, 3, 3, 12, 0), (4, 0, 1, 0, 0), (7, 3, 3, 6, 1)]
)
def test_several_rows_for_each_row_of_the_batch(size: int, rows: int, given: int, kept: int, misfits: int) -> None:
    part, found = rows_that_count(tf.zeros([size, 2]), rows, given)
    assert part.shape == (kept, 2)
    assert float(found) == misfits


@pytest.mark.parametrize("shape", [(), (5,)])
def test_what_is_the_same_size_for_any_batch_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"neither a row for each row of the batch.*for any batch"):
        rows_that_count(tf.zeros(shape), tf.constant(3), tf.constant(3))
