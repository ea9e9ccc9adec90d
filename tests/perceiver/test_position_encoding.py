"""Position encodings against DeepMind's definition, written as loops."""

import math
from pathlib import Path

import keras
import numpy as np
import pytest
from layer_checks import check_layer

from perceiver.position_encoding import FourierPositionEncoding, LearnedPositionEncoding, fourier_features


@pytest.mark.parametrize("max_resolution", [(5, 3), (9, 7)])
def test_fourier_features_equal_deepmind(max_resolution: tuple[int, int]) -> None:
    bands = 4
    rows = []
    for i in range(5):
        for j in range(3):
            y, x = -1 + 2 * i / 4, -1 + 2 * j / 2
            f_y = [1 + k * (max_resolution[0] / 2 - 1) / (bands - 1) for k in range(bands)]
            f_x = [1 + k * (max_resolution[1] / 2 - 1) / (bands - 1) for k in range(bands)]
            angles = [math.pi * f * y for f in f_y] + [math.pi * f * x for f in f_x]
            rows.append([y, x, *map(math.sin, angles), *map(math.cos, angles)])
    features = fourier_features((5, 3), bands, max_resolution)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, rows, atol=1e-6)
    np.testing.assert_array_equal(fourier_features((5, 3), bands, max_resolution, False), features[:, 2:])


def test_default_resolution_is_the_grid() -> None:
    np.testing.assert_array_equal(fourier_features((5, 3), 4), fourier_features((5, 3), 4, (5, 3)))


def test_imagenet_features_are_258_wide() -> None:
    assert fourier_features((224, 224), 64).shape == (50176, 258)


@pytest.mark.parametrize("combination", ["concat", "add"])
def test_fourier_layer(combination: str, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(size=(2, 15, 7)).astype("float32")

    def make() -> keras.layers.Layer:
        return FourierPositionEncoding((5, 3), 4, combination=combination)

    check_layer(make, [inputs], tmp_path)
    layer = make()
    outputs = np.asarray(layer(inputs))
    features = fourier_features((5, 3), 4)
    if combination == "add":
        projected = features @ layer.projection.kernel.numpy() + layer.projection.bias.numpy()
        np.testing.assert_allclose(outputs, inputs + projected, atol=1e-5)
    else:
        np.testing.assert_allclose(outputs[1], np.concatenate([inputs[1], features], axis=-1), atol=1e-6)


@pytest.mark.parametrize(("combination", "dim"), [("add", None), ("concat", None), ("concat", 3)])
def test_learned_layer(combination: str, dim: int | None, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(size=(2, 15, 7)).astype("float32")

    def make() -> keras.layers.Layer:
        return LearnedPositionEncoding(15, dim, combination)

    check_layer(make, [inputs], tmp_path)
    layer = make()
    outputs = np.asarray(layer(inputs))
    positions = layer.positions.numpy()
    assert positions.shape == (15, dim or 7)
    expected = inputs[1] + positions if combination == "add" else np.concatenate([inputs[1], positions], axis=-1)
    np.testing.assert_allclose(outputs[1], expected, atol=1e-6)


def test_rows_have_to_fit() -> None:
    with pytest.raises(ValueError, match=r"the data array has 15 rows, its positions 16"):
        LearnedPositionEncoding(16).build((None, 15, 7))
    with pytest.raises(ValueError, match=r"the data array has 15 rows, its positions 16"):
        FourierPositionEncoding((4, 4), 2).build((None, 15, 7))
