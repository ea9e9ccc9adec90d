"""Checks that every Keras layer of the project must pass: configs, files, precisions, execution modes, gradients."""

from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf


def check_layer(
    make_layer: Callable[[], keras.layers.Layer],
    inputs: Sequence[np.ndarray],
    tmp_path: Path,
    tolerance: float = 1e-5,
) -> None:
    """Checks a layer without randomness; `inputs` are its positional arguments."""
    layer = make_layer()
    expected = keras.ops.convert_to_numpy(layer(*inputs))
    config = layer.get_config()
    assert type(layer).from_config(config).get_config() == config

    for jit_compile in (False, True):
        compiled = tf.function(layer, jit_compile=jit_compile)(*map(tf.constant, inputs))
        np.testing.assert_allclose(compiled, expected, atol=tolerance, rtol=tolerance)

    symbolic = [keras.Input(x.shape[1:], batch_size=x.shape[0], dtype=x.dtype.name) for x in inputs]
    model = keras.Model(symbolic, layer(*symbolic))
    assert tuple(model.output.shape) == expected.shape
    model.save(tmp_path / "layer.keras")
    loaded = keras.saving.load_model(tmp_path / "layer.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded(list(inputs)), model(list(inputs)))

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(*inputs)))
    for weight, gradient in zip(
        layer.trainable_variables, tape.gradient(loss, [v.value for v in layer.trainable_variables]), strict=True
    ):
        assert gradient is not None, weight.path
        assert np.isfinite(gradient).all(), weight.path

    for policy in ("mixed_bfloat16", "mixed_float16"):
        mixed = type(layer).from_config({**config, "dtype": policy})
        outputs = mixed(*inputs)
        assert outputs.dtype == mixed.compute_dtype
        mixed.set_weights(layer.get_weights())
        np.testing.assert_allclose(tf.cast(mixed(*inputs), "float32"), expected, atol=0.1, rtol=0.1)
