"""Preprocessing layers: values, order of patches, precision."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import keras
import numpy as np
import pytest
from layer_checks import check_layer
from tiny_perceivers import TINY

from perceiver import Perceiver
from perceiver.preprocessing import ConvStem, ImageNormalization, PatchStem

_IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3)).astype("uint8")
_FLOATS = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype("float32")


def test_normalisation() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    outputs = ImageNormalization(mean, std)(_IMAGES)
    np.testing.assert_allclose(outputs, (_IMAGES / 255.0 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(ImageNormalization()(_IMAGES), _IMAGES / 127.5 - 1, atol=1e-6)


def test_resizing_is_keras_bilinear_whatever_the_image_data_format() -> None:
    resized = keras.layers.Resizing(16, 16, data_format="channels_last")(_IMAGES / 127.5 - 1)
    np.testing.assert_allclose(ImageNormalization(size=(16, 16))(_IMAGES), resized, atol=1e-5)
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        np.testing.assert_allclose(ImageNormalization(size=(16, 16))(_IMAGES), resized, atol=1e-5)
    finally:
        keras.config.set_image_data_format(before)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_normalises_in_float32_under_mixed_precision(policy: str) -> None:
    mean, std = (0.5,) * 3, (0.01,) * 3
    layer = ImageNormalization(mean, std, dtype=policy)
    full = ImageNormalization(mean, std)(_IMAGES)
    np.testing.assert_array_equal(layer(_IMAGES), keras.ops.cast(full, layer.compute_dtype))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_equal_keras(patch_size: int) -> None:
    expected = keras.ops.image.extract_patches(_FLOATS, patch_size, data_format="channels_last")
    outputs = PatchStem(patch_size)(_FLOATS)
    np.testing.assert_array_equal(outputs, keras.ops.reshape(expected, outputs.shape))


@pytest.mark.parametrize("pool_size", [2, 3])
def test_conv_stem_pools_before_relu_with_the_same_result(pool_size: int) -> None:
    stem = ConvStem(2, 4, units=6, pool_size=pool_size)
    outputs = stem(_FLOATS)
    x = _FLOATS
    for convolution in stem.convolutions:
        x = keras.ops.relu(convolution(x))
        x = keras.ops.max_pool(x, pool_size, strides=2, padding="same", data_format="channels_last")
    np.testing.assert_array_equal(outputs, keras.ops.reshape(x, (2, 6, 6)))


def test_channels_of_a_conv_stem_grow_to_those_before_the_last() -> None:
    stem = ConvStem(4, 8, units=6, channel_growth=2)
    stem.build((None, 7, 5, 3))
    assert [convolution.filters for convolution in stem.convolutions] == [2, 4, 8, 6]
    assert stem(_FLOATS[:, :7, :5]).shape == (2, 1, 6)


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (lambda **kw: ImageNormalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (16, 16), **kw), _IMAGES),
        (lambda **kw: PatchStem(4, 5, **kw), _FLOATS),
        (lambda **kw: PatchStem(**kw), _FLOATS),
        (lambda **kw: ConvStem(2, 4, 6, 3, **kw), _FLOATS),
        (lambda **kw: ConvStem(3, 4, 6, 3, 2, **kw), _FLOATS[:, :7, :11]),
    ],
)
def test_layers(make: Callable[[], keras.layers.Layer], images: np.ndarray, tmp_path: Path) -> None:
    check_layer(make, [images], tmp_path)


def test_a_row_of_the_data_array_sees_its_own_patch_alone() -> None:
    config = replace(TINY["patches"], input_mlp_widening_factor=2)
    model = Perceiver(**asdict(config))
    model.build()
    images = np.zeros((2, *config.image_shape), np.uint8)
    images[1, 2:4, 4:6] = 255  # the patch in the second row and the third column of the grid
    rows = keras.ops.convert_to_numpy(model.data_array(images))
    # Not compared for equality: a product of matrices may round equal rows differently, by where they stand in it.
    assert (np.abs(rows[0] - rows[1]).max(axis=-1) > 1e-5).nonzero()[0].tolist() == [config.grid[1] + 2]
    bare = keras.ops.convert_to_numpy(model.positions(model.stem(model.normalization(images))))
    expected = bare + keras.ops.convert_to_numpy(model.input_mlp(model.input_norm(bare)))
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert np.abs(rows - bare).max() > 1e-3
