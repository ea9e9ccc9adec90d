"""Where the heads of each latent look in the grid before they know the image: learned Gaussians that bias the logits.

Attention alone has to learn from the data that neighbouring cells belong together. Heads that start as a convolution
does, each beside the place of its latent, learn it faster, and are free to leave: as in ConViT (d'Ascoli et al.,
arXiv:2103.10697, eq. 7) and SMCA (Gao et al., arXiv:2101.07448, section 3.2).
"""

import math
from typing import Any

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops

from perceiver.config import prior_width

Shape = tuple[Any, ...]  # integers, None where a size is unknown

INITIAL_STD = 0.25
"""Standard deviation of the Gaussians at the start, in halves of a side of the image."""
SPACING = 0.3
"""Distance between the centres of neighbouring heads of a latent at the start, in the same unit."""


@keras.saving.register_keras_serializable(package="perceiver")
class SpatialPrior(keras.layers.Layer):
    """Additional queries and keys whose products are log-Gaussians over the grid, up to a constant for each query.

    The logit of head h, latent n and cell m gets -sum_i p_hni (x_mi - c_hni)^2 over both dimensions i, with learned
    centres c and precisions p. The terms p c^2 are left out, since a softmax over the cells cancels them. The rest is
    the product of (2 p c, -p) and (x, x^2), so that every implementation of attention serves.

    That cancels digits where Gaussians are narrow: with a standard deviation of 0.05 and 56 x 56 cells, 15% of the
    weights of a head were at other cells in bfloat16 than in float32. So on grids of more than 8 cells along
    a side, a further column has the terms p c^2, with which the logits are small where the weights are large, and x
    and x^2 have a second part, what bfloat16 cannot hold of them.

    Args:
        grid: Rows and columns of the grid that the data array flattens; it has M cells.
        num_heads: Number of heads H.
        num_queries: Number of latents N.

    Call: queries (B, H, N, d) -> (B, H, N, d + 4), or d + 9 on larger grids. The keys are extended by the method of
    that name.

    Example:
        >>> prior = SpatialPrior((2, 2), num_heads=1, num_queries=3)
        >>> prior(np.zeros((5, 1, 3, 8))).shape, prior.extend_keys(np.zeros((5, 1, 4, 8), "float32")).shape
        ((5, 1, 3, 12), (5, 1, 4, 12))
    """

    def __init__(self, grid: tuple[int, int], num_heads: int, num_queries: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.grid = (grid[0], grid[1])
        self.num_heads = num_heads
        self.num_queries = num_queries

    def build(self, queries_shape: Shape) -> None:
        # Positions and centres run from -1 to 1, so that a step of the optimizer, which is about as large for every
        # weight, is a small move. Precisions are logarithms, so that they stay positive.
        self.positions = _centres(self.grid).astype("float32")
        regions = _centres(_factors(self.num_queries))
        head_grid = _factors(self.num_heads)
        offsets = _centres(head_grid) * head_grid * SPACING / 2
        centres = (regions[None] + offsets[:, None]).astype("float32")

        def at_centres(shape: Shape, dtype: Any = None) -> Tensor:
            return ops.convert_to_tensor(centres, dtype)

        self.centres = self.add_weight(shape=centres.shape, initializer=at_centres, name="centres")
        initial = keras.initializers.Constant(-math.log(2 * INITIAL_STD**2))
        self.log_precisions = self.add_weight(shape=centres.shape, initializer=initial, name="log_precisions")

    def call(self, queries: Tensor) -> Tensor:
        precisions = ops.exp(self.log_precisions)
        factors = [2 * precisions * self.centres, -precisions]
        if prior_width(self.grid) > 4:
            constant = -ops.sum(precisions * ops.square(self.centres), axis=-1, keepdims=True)
            factors = [*factors, *factors, constant]
        return _join(queries, ops.concatenate(factors, axis=-1)[None])

    def extend_keys(self, keys: Tensor) -> Tensor:
        """(B, H, M, d) -> (B, H, M, d + 4) or d + 9: the position of each cell in the grid, and its square."""
        features = np.concatenate([self.positions, self.positions**2], axis=-1)
        if prior_width(self.grid) > 4:
            mantissas, exponents = np.frexp(features)
            first = np.ldexp(np.round(mantissas * 256) / 256, exponents)  # the digits that bfloat16 has
            features = np.concatenate([first, features - first, np.ones_like(features[:, :1])], axis=-1)
        return _join(keys, ops.convert_to_tensor(features)[None, None])

    def compute_output_shape(self, queries_shape: Shape) -> Shape:
        return *queries_shape[:-1], queries_shape[-1] + prior_width(self.grid)

    def get_config(self) -> dict[str, Any]:
        own = {"grid": self.grid, "num_heads": self.num_heads, "num_queries": self.num_queries}
        return {**super().get_config(), **own}


def _join(x: Tensor, features: Tensor) -> Tensor:
    """(B, H, n, d) and (1, H or 1, n, f) -> (B, H, n, d + f)"""
    features = ops.broadcast_to(ops.cast(features, x.dtype), (*ops.shape(x)[:3], features.shape[-1]))
    return ops.concatenate([x, features], axis=-1)


def _centres(grid: tuple[int, int]) -> np.ndarray:
    """Row and column of the centre of each cell of a grid over [-1, 1] x [-1, 1], in row-major order: (cells, 2)."""
    axes = [(2 * np.arange(cells) + 1) / cells - 1 for cells in grid]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def _factors(number: int) -> tuple[int, int]:
    """Rows and columns of the grid of so many cells that is closest to a square, at least as wide as high."""
    rows = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return rows, number // rows
