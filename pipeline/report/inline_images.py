"""Images as data URIs, so that the report needs no other file.

Images of the data are shown as they are, as PNG, up to `SMALL` pixels. Larger ones are scaled down to `LARGEST` pixels
and stored as JPEG, so that a page with a hundred photographs stays below a few megabytes.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.report.svg_charts import row_shares

# matplotlib's "inferno" in five colours: black, violet, red, orange, pale yellow. Brightness grows with the value, so
# that the order is visible without colour vision and in greyscale.
COLOUR_MAP = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)

# Longer side, in pixels, of the largest image that is shown exactly, and of a larger one on the page.
SMALL, LARGEST = 64, 128


def data_uri(image: np.ndarray) -> str:
    """Data URI of a PNG of `image`, uint8 (H, W, C) with 1 or 3 channels."""
    return _encoded(_to_rgb(image), "PNG", optimize=True)


def picture_uri(image: np.ndarray) -> str:
    """Data URI of `image`, uint8 (H, W, C) with 1 or 3 channels: exact if it is small, else scaled down and lossy."""
    if is_small(image.shape):
        return data_uri(image)
    return _encoded(_scaled(image), "JPEG", quality=85)


def is_small(shape: tuple[int, ...]) -> bool:
    """Whether `picture_uri` keeps the pixels of an image of this shape (H, W, C)."""
    return max(shape[:2]) <= SMALL


def matrix_image(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix (N, N) with one pixel per cell: uint8 (N, N, 3), brighter for a larger share of the row."""
    return heat_map(np.sqrt(row_shares(matrix)))


def heat_map(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 (H, W, 3), of values (H, W) in [0, 1]."""
    places = np.linspace(0, 1, len(COLOUR_MAP))
    channels = [np.interp(values, places, COLOUR_MAP[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def attention_overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A grey image below a heat map of attention weights: uint8 (height, width, 3).

    The longer side has `SMALL` pixels for a small image, else at most `LARGEST`.

    Args:
        image: uint8 (H, W, C).
        weights: non-negative (rows, columns); the largest weight gets the brightest colour.
    """
    grey = _scaled(image).convert("L").convert("RGB")
    scaled = Image.fromarray((weights / max(weights.max(), 1e-12)).astype(np.float32))
    attended = np.clip(np.asarray(scaled.resize(grey.size, Image.Resampling.BICUBIC)), 0, 1)
    return np.rint(0.4 * np.asarray(grey, float) + 0.6 * heat_map(attended)).astype(np.uint8)


def _scaled(image: np.ndarray) -> Image.Image:
    """`image` with a longer side of `SMALL` pixels, which stay visible, or scaled down to `LARGEST` if it is larger."""
    longer = max(image.shape[:2])
    factor = SMALL / longer if is_small(image.shape) else min(1.0, LARGEST / longer)
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    filtered = Image.Resampling.NEAREST if is_small(image.shape) else Image.Resampling.LANCZOS
    return _to_rgb(image).resize((width, height), filtered)


def _encoded(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _to_rgb(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
