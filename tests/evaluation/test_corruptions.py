"""Corruptions: the same for the same seed, stronger with severity, and each against its definition."""

import colorsys

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline.evaluation.corruptions import CORRUPTIONS, corrupt


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth images that are not square; both noise and blur change them."""
    rough = np.random.default_rng(0).random((6, 32, 24, 3))
    smooth = gaussian_filter(rough, sigma=(0, 2, 2, 0))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return np.rint(255 * smooth).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption(images: np.ndarray, name: str) -> None:
    before, damage = images.copy(), []
    for severity in range(1, 6):
        corrupted = corrupt(images, name, severity, seed=0)
        assert (corrupted.dtype, corrupted.shape) == (np.uint8, images.shape)
        np.testing.assert_array_equal(corrupted, corrupt(images, name, severity, seed=0))
        damage.append(np.abs(corrupted.astype(float) - images).mean())
    assert damage[0] > 0.02
    assert damage[-1] > 1.5 * damage[0]
    if name != "pixelate":  # the damage depends on how well its grid fits the image too
        assert damage == sorted(damage)
    np.testing.assert_array_equal(images, before)
    grey = corrupt(images[..., :1], name, 5, seed=0)
    assert grey.shape == (6, 32, 24, 1)


def test_noise_has_its_strength_and_its_seed(images: np.ndarray) -> None:
    grey = np.full((20, 32, 32, 1), 128, np.uint8)
    noisy = corrupt(grey, "noise", 5, seed=0)
    assert (noisy.astype(float) / 255).std() == pytest.approx(0.1, rel=0.02)
    assert (noisy != corrupt(grey, "noise", 5, seed=1)).any()
    difference = noisy.astype(float) - corrupt(grey, "noise", 4, seed=0)
    assert difference.std() / 255 == pytest.approx(np.hypot(0.1, 0.09), rel=0.05), "not the same noise, only stronger"


def test_blur_spreads_a_point_as_a_gaussian_and_repeats_the_border() -> None:
    point = np.zeros((1, 9, 11, 1), np.uint8)
    point[0, 4, 5] = 255
    bell = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    bell /= bell.sum()
    np.testing.assert_allclose(corrupt(point, "blur", 5, seed=0)[0, :, 1:10, 0] / 255, np.outer(bell, bell), atol=2e-3)
    flat = np.full((1, 9, 11, 3), 200, np.uint8)
    np.testing.assert_array_equal(corrupt(flat, "blur", 5, seed=0), flat)


def test_pixelate_is_close_to_pillow(images: np.ndarray) -> None:
    corrupted = corrupt(images, "pixelate", 5, seed=0)
    for image, found in zip(images, corrupted, strict=True):
        small = Image.fromarray(image).resize((int(24 * 0.65), int(32 * 0.65)), Image.Resampling.BOX)
        # They are not equal: Pillow counts a pixel that an edge cuts wholly or not at all.
        expected = np.asarray(small.resize((24, 32), Image.Resampling.BOX))
        assert np.abs(found.astype(float) - expected).mean() < 5


def test_brightness_raises_the_value_and_leaves_hue_and_saturation(images: np.ndarray) -> None:
    corrupted = corrupt(images, "brightness", 3, seed=0)
    for before, after in zip(images[0].reshape(-1, 3)[::97], corrupted[0].reshape(-1, 3)[::97], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        np.testing.assert_allclose(
            after / 255, colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.15)), atol=1.01 / 255
        )
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert (corrupt(black, "brightness", 3, seed=0) == round(0.15 * 255)).all()


def test_contrast_keeps_the_mean_of_each_channel(images: np.ndarray) -> None:
    corrupted = corrupt(images, "contrast", 5, seed=0)
    np.testing.assert_allclose(corrupted.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=0.5)
    np.testing.assert_allclose(corrupted.std(axis=(1, 2)), 0.15 * images.std(axis=(1, 2)), rtol=0.1)
