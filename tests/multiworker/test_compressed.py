"""Gradients in bfloat16: what is sent follows the gradients, and what is not finite leaves no trace."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import multiworker
from pipeline.multiworker.compressed import rounded


def test_what_was_sent_follows_the_sum_of_the_gradients() -> None:
    gradients = tf.random.stateless_normal((100, 50), seed=(0, 0)) + 0.37
    sent, plain, owed = tf.zeros([50]), tf.zeros([50]), tf.zeros([50])
    for gradient in gradients:
        part, owed = rounded(gradient, owed)
        assert part.dtype == tf.bfloat16
        sent += tf.cast(part, tf.float32)
        plain += tf.cast(tf.cast(gradient, tf.bfloat16), tf.float32)
    expected = tf.reduce_sum(gradients, 0).numpy()
    error, without_feedback = np.abs(sent - expected).max(), np.abs(plain - expected).max()
    assert error < 2**-7, "more than the rounding of one step"
    assert without_feedback > 2 * error, "the comparison shows nothing"


def test_a_gradient_that_is_lost_in_rounding_arrives_later() -> None:
    owed, sent = tf.zeros([1]), 0.0
    for _ in range(64):
        part, owed = rounded(tf.constant([256.0 + 0.25]), owed)
        sent += float(part[0])
    assert float(tf.cast(tf.constant(256.25), tf.bfloat16)) == 256.0
    assert sent == pytest.approx(64 * 256.25, abs=2)


def test_what_is_not_finite_is_sent_and_not_owed() -> None:
    sent, owed = rounded(tf.constant([np.inf, np.nan, 1.0]), tf.constant([0.0, 0.0, 0.5]))
    assert np.isinf(float(sent[0]))
    assert np.isnan(float(sent[1]))
    np.testing.assert_array_equal(owed, [0.0, 0.0, 0.0])


def test_another_dtype_is_refused() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="gradient_dtype='int8': take 'float32' or 'bfloat16'"):
        multiworker.enable(model, gradient_dtype="int8")
