"""Pictures of the report: small ones exact, large ones scaled down, attention over both."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.report.inline_images import attention_overlay, picture_uri


def test_the_overlay_is_bright_where_the_attention_is() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[0, 3] = 1
    overlay = attention_overlay(np.zeros((8, 8, 1), np.uint8), weights).sum(axis=-1)
    assert overlay.shape == (64, 64)
    assert overlay[:16, 48:].mean() > 10 * overlay[32:, :32].mean() + 1


def shown(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.mark.parametrize("shape", [(64, 48, 3), (8, 8, 3)])
def test_small_images_keep_their_pixels(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(shown(picture_uri(image)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_shown_small_in_their_colours_and_proportions(channels: int) -> None:
    image = np.full((224, 448, channels), 40, np.uint8)
    image[:, 224:, 0] = 200
    found = shown(picture_uri(image))
    assert found.shape == (64, 128, 3)
    np.testing.assert_allclose(found[:, [16, -16], 0].mean(axis=0), [40, 200], atol=5)
    overlay = attention_overlay(image, np.eye(4, dtype=np.float32))
    assert overlay.shape == (64, 128, 3)
    assert attention_overlay(image[:100, :100], np.eye(4, dtype=np.float32)).shape == (100, 100, 3)
