"""Corruptions of images in five severities, with the strengths of CIFAR-10-C.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(arXiv:1903.12261). These five need neither a codec nor photographs of frost. `pixelate` is not Pillow's box filter,
which rounds the area that two pixels share to the whole pixel or nothing.
"""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter


def corrupt(images: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """A corrupted copy of images.

    Args:
        images: uint8 (N, H, W, C).
        name: One of `CORRUPTIONS`.
        severity: 1, the weakest, to 5.
        seed: Seed of the noise; each corruption and severity draws other random numbers from it.

    Returns:
        uint8 (N, H, W, C).
    """
    function, strengths = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name), severity])
    corrupted = function(images.astype(np.float32) / 255, strengths[severity - 1], rng)
    return np.rint(np.clip(corrupted, 0, 1) * 255).astype(np.uint8)


def _noise(images: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return images + deviation * rng.standard_normal(images.shape, np.float32)


def _blur(images: np.ndarray, sigma: float, _: np.random.Generator) -> np.ndarray:
    """Gaussian blur with the border pixels repeated."""
    return gaussian_filter(images, sigma, mode="nearest", axes=(1, 2))


def _brightness(images: np.ndarray, added: float, _: np.random.Generator) -> np.ndarray:
    """Adds to the value of HSV, the largest channel; hue and saturation stay."""
    value = images.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, images * (brighter / np.maximum(value, 1e-6)), brighter)


def _contrast(images: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    mean = images.mean(axis=(1, 2), keepdims=True)
    return (images - mean) * factor + mean


def _pixelate(images: np.ndarray, scale: float, _: np.random.Generator) -> np.ndarray:
    """Scales down and up again; each pixel is the mean of the area that it covers."""
    weights = []
    for size in images.shape[1:3]:
        fewer = max(1, int(size * scale))
        weights.append(_area_weights(size, fewer) @ _area_weights(fewer, size))
    return np.einsum("ph,nhwc,qw->npqc", weights[0], images, weights[1], optimize=True)


def _area_weights(size_out: int, size_in: int) -> np.ndarray:
    """(size_out, size_in): the share that each input pixel has in each output pixel."""
    edges_out, edges_in = np.linspace(0, 1, size_out + 1), np.linspace(0, 1, size_in + 1)
    upper = np.minimum(edges_out[1:, np.newaxis], edges_in[1:])
    lower = np.maximum(edges_out[:-1, np.newaxis], edges_in[:-1])
    return (np.maximum(upper - lower, 0) * size_out).astype(np.float32)


Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""Function, and its strength in each of the five severities."""
