"""GELU and its gradient against TensorFlow's."""

import numpy as np
import pytest
import tensorflow as tf

from perceiver.gelu import gelu


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03), ("float16", 3e-3)])
def test_values_and_gradients_equal_tensorflow(approximate: bool, dtype: str, tolerance: float) -> None:
    rows = tf.cast(tf.reshape(tf.linspace(-9.0, 9.0, 361), (19, 19)), dtype)
    results = []
    for function in (gelu, tf.nn.gelu):
        wide = rows if function is gelu else tf.cast(rows, "float32")
        with tf.GradientTape() as tape:
            tape.watch(wide)
            outputs = function(wide, approximate)
            loss = tf.reduce_sum(tf.sin(tf.cast(outputs, "float32")))
        gradient = tape.gradient(loss, wide)
        assert outputs.dtype == gradient.dtype == wide.dtype
        results.append([tf.cast(x, "float32").numpy() for x in (outputs, gradient)])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
