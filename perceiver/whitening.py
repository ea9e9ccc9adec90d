"""Decorrelation of image patches by the covariance of natural images, in closed form and so without a data set.

Neighbouring pixels of natural images are alike: a projection of raw patches sees almost nothing but their mean colour.
The covariance is taken as that of a first-order Markov process in each dimension, r ** distance, the model of image
coding (Jain, 1989, "Fundamentals of Digital Image Processing", section 2.9). The measured covariance of CIFAR-100 gains
as much, within the noise of a seed (docs/results.md).
"""

from functools import reduce

import numpy as np

PIXEL_CORRELATION = 0.95
"""Correlation of neighbouring pixels; 0.94 in CIFAR-100."""
CHANNEL_CORRELATION = 0.9
"""Correlation of neighbouring channels; 0.86 and 0.89 in CIFAR-100."""
NOISE = 0.01
"""Variance that is added to that of each direction, so that those with nearly none are not amplified without bound."""


def patch_whitening(patch_size: int, channels: int) -> np.ndarray:
    """The symmetric whitening matrix (C + NOISE I)^(-1/2) of patches whose covariance is C.

    A symmetric one is unique, whereas the signs of eigenvectors depend on the library that computes them.

    Args:
        patch_size: Side of a patch in pixels.
        channels: Channels of a pixel.

    Returns:
        float32 array of shape (P, P), P = patch_size**2 * channels; a patch is flattened by rows, columns, channels.
    """
    pixels, colours = _markov(patch_size, PIXEL_CORRELATION), _markov(channels, CHANNEL_CORRELATION)
    # The covariance is a Kronecker product, so that its eigenvectors and eigenvalues are products too.
    parts = [np.linalg.eigh(part) for part in (pixels, pixels, colours)]
    variances = reduce(np.kron, [values for values, _ in parts])
    directions = reduce(np.kron, [vectors for _, vectors in parts])
    return ((directions / np.sqrt(variances + NOISE)) @ directions.T).astype("float32")


def _markov(size: int, correlation: float) -> np.ndarray:
    """Covariance (size, size) of a stationary first-order Markov process of variance 1."""
    places = np.arange(size)
    return correlation ** np.abs(places[:, None] - places[None])
