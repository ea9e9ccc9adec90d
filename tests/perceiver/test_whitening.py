"""The whitening of patches: what it does to the covariance it assumes, and how the stem applies it."""

import numpy as np
import pytest
from keras import ops

from perceiver import PerceiverConfig
from perceiver.preprocessing import PatchStem
from perceiver.whitening import CHANNEL_CORRELATION, NOISE, PIXEL_CORRELATION, patch_whitening


def _covariance(patch_size: int, channels: int) -> np.ndarray:
    """Of the places (row, column, channel) of a patch, written out element by element."""
    places = [(i, j, k) for i in range(patch_size) for j in range(patch_size) for k in range(channels)]
    return np.array(
        [
            [
                PIXEL_CORRELATION ** (abs(a[0] - b[0]) + abs(a[1] - b[1])) * CHANNEL_CORRELATION ** abs(a[2] - b[2])
                for b in places
            ]
            for a in places
        ]
    )


@pytest.mark.parametrize(("patch_size", "channels"), [(4, 3), (2, 1), (1, 3), (1, 1)])
def test_it_is_the_inverse_square_root_of_the_covariance(patch_size: int, channels: int) -> None:
    matrix = patch_whitening(patch_size, channels).astype("float64")
    covariance = _covariance(patch_size, channels) + NOISE * np.eye(len(matrix))
    np.testing.assert_allclose(matrix @ covariance @ matrix, np.eye(len(matrix)), atol=1e-4)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)


def test_the_directions_of_natural_images_differ_less_afterwards() -> None:
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg")[:424, :640].astype("float64")
    image = (image - image.mean((0, 1))) / image.std((0, 1))
    patches = image.reshape(106, 4, 160, 4, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 48)
    before, after = (np.linalg.eigvalsh(np.cov(rows.T)) for rows in (patches, patches @ patch_whitening(4, 3)))
    shares = [values[-1] / values.sum() for values in (before, after)]
    assert shares[0] > 0.5  # the mean colour
    assert shares[1] < 0.2


@pytest.mark.parametrize("units", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_stem_projects_whitened_patches(units: int | None, dtype: str) -> None:
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    stem = PatchStem(4, units, whitening=True, dtype=dtype)
    rows = ops.convert_to_numpy(ops.cast(stem(images), "float32"))
    plain = PatchStem(4)
    expected = ops.convert_to_numpy(plain(images)) @ patch_whitening(4, 3)
    if units:
        stem.projection.bias.assign(np.arange(5))
        rows = ops.convert_to_numpy(ops.cast(stem(images), "float32"))
        kernel, bias = (ops.convert_to_numpy(v) for v in stem.projection.weights)
        expected = expected @ kernel + bias
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.03}[dtype]
    np.testing.assert_allclose(rows, expected, atol=tolerance * np.abs(expected).max())


def test_a_convolutional_stem_has_no_patches_to_whiten() -> None:
    with pytest.raises(ValueError, match=r"model\.patch_whitening = True: the conv stem has no patches"):
        PerceiverConfig(patch_whitening=True)


def test_patches_too_large_to_be_whitened_are_refused() -> None:
    message = r"model\.patch_size = 64: .* 12,288 values .* give smaller patches, at most 36, or set"
    with pytest.raises(ValueError, match=message):
        PerceiverConfig(image_shape=(128, 128, 3), stem="patches", patch_size=64, patch_whitening=True)
    PerceiverConfig(image_shape=(128, 128, 3), stem="patches", patch_size=32, patch_whitening=True)
