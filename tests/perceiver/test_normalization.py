"""LayerNorm against Keras's, and the checks of every layer."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_checks import check_layer

from perceiver.normalization import LayerNorm

_ROWS = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 6)).astype("float32")


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("float32", 1e-5), ("mixed_bfloat16", 0.05), ("mixed_float16", 5e-3)]
)
def test_values_and_gradients_equal_keras(policy: str, tolerance: float) -> None:
    random = np.random.default_rng(1)
    weights = [random.normal(size=6).astype("float32") for _ in range(2)]
    results = []
    for layer in (LayerNorm(epsilon=1e-5, dtype=policy), keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy)):
        layer.build(_ROWS.shape)
        layer.set_weights(weights)
        rows = tf.cast(_ROWS, layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(rows)
            outputs = layer(rows)
            loss = tf.reduce_sum(tf.sin(tf.cast(outputs, "float32")))
        gradients = tape.gradient(loss, [rows, *(v.value for v in layer.trainable_variables)])
        assert outputs.dtype == gradients[0].dtype == layer.compute_dtype
        results.append([tf.cast(x, "float32").numpy() for x in (outputs, *gradients)])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


def test_a_row_of_equal_numbers_has_finite_gradients() -> None:
    rows = tf.ones((1, 6))
    layer = LayerNorm()
    with tf.GradientTape() as tape:
        tape.watch(rows)
        loss = tf.reduce_sum(layer(rows) * tf.range(6.0))
    assert np.isfinite(tape.gradient(loss, rows)).all()


def test_layer(tmp_path: Path) -> None:
    check_layer(lambda: LayerNorm(epsilon=1e-5, name="layer"), (_ROWS,), tmp_path)
