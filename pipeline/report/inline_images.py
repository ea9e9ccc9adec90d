"""Images as PNG data URIs, so that the report needs no other file."""

import base64
import io

import numpy as np
from PIL import Image

from pipeline.report.svg_charts import row_shares

# matplotlib's "inferno" in five colours: black, violet, red, orange, pale yellow. Brightness grows with the value, so
# that the order is visible without colour vision and in greyscale.
COLOUR_MAP = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)


def data_uri(image: np.ndarray) -> str:
    """Data URI of a PNG of `image`, uint8 (H, W, C) with 1 or 3 channels."""
    file = io.BytesIO()
    _to_rgb(image).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def matrix_image(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix (N, N) with one pixel per cell: uint8 (N, N, 3), brighter for a larger share of the row."""
    return heat_map(np.sqrt(row_shares(matrix)))


def heat_map(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 (H, W, 3), of values (H, W) in [0, 1]."""
    places = np.linspace(0, 1, len(COLOUR_MAP))
    channels = [np.interp(values, places, COLOUR_MAP[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def attention_overlay(image: np.ndarray, weights: np.ndarray, size: int = 64) -> np.ndarray:
    """A grey image below a heat map of attention weights: uint8 (size, size, 3).

    Args:
        image: uint8 (H, W, C).
        weights: non-negative (rows, columns); the largest weight gets the brightest colour.
    """
    grey = _to_rgb(image).convert("L").convert("RGB").resize((size, size), Image.Resampling.NEAREST)
    scaled = Image.fromarray((weights / max(weights.max(), 1e-12)).astype(np.float32))
    attended = np.clip(np.asarray(scaled.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)
    return np.rint(0.4 * np.asarray(grey, float) + 0.6 * heat_map(attended)).astype(np.uint8)


def _to_rgb(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
