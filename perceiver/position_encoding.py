"""Position encodings of the data array: Fourier features as DeepMind's code defines them, and learned vectors."""

import math
from typing import Any

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import ops

Shape = tuple[Any, ...]  # integers, None where a size is unknown


def fourier_features(
    grid: tuple[int, ...],
    num_bands: int,
    max_resolution: tuple[int, ...] | None = None,
    include_positions: bool = True,
) -> np.ndarray:
    """Fourier features of the cells of a grid.

    Positions run from -1 to 1 in each dimension, frequencies from 1 to half the highest sampling rate. The features
    are, in this order: positions, sines of all bands of the first dimension, of the second, ..., then the cosines.

    Args:
        grid: Number of cells in each dimension.
        num_bands: Number of frequencies K in each dimension.
        max_resolution: Highest sampling rate in each dimension; None: the grid.
        include_positions: Whether the positions themselves come first.

    Returns:
        float32 array of shape (cells, dimensions * (2 K + include_positions)), cells in row-major order.
    """
    axes = [np.linspace(-1.0, 1.0, n) for n in grid]
    positions = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(grid))
    frequencies = np.stack([np.linspace(1.0, n / 2, num_bands) for n in max_resolution or grid])
    angles = np.pi * (positions[:, :, None] * frequencies).reshape(len(positions), -1)
    features = ([positions] if include_positions else []) + [np.sin(angles), np.cos(angles)]
    return np.concatenate(features, axis=-1).astype("float32")


@keras.saving.register_keras_serializable(package="perceiver")
class FourierPositionEncoding(keras.layers.Layer):
    """Joins Fourier features to the rows of a data array.

    Args:
        grid: Rows and columns of the grid that the data array flattens; it has M cells.
        num_bands: Number of frequencies in each dimension.
        max_resolution: Highest sampling rate, the same for all dimensions; None: the grid.
        include_positions: Whether the positions themselves are features too.
        combination: "concat", or "add" after a learned projection to the width of the inputs.

    Call: (B, M, C) -> (B, M, C + features) with "concat", (B, M, C) with "add".

    Example:
        >>> FourierPositionEncoding((4, 4), num_bands=2)(np.zeros((1, 16, 3))).shape
        (1, 16, 13)
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        num_bands: int,
        max_resolution: int | None = None,
        include_positions: bool = True,
        combination: str = "concat",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.grid = tuple(grid)
        self.num_bands = num_bands
        self.max_resolution = max_resolution
        self.include_positions = include_positions
        self.combination = combination

    def build(self, input_shape: Shape) -> None:
        resolution = None if self.max_resolution is None else (self.max_resolution,) * len(self.grid)
        self.features = fourier_features(self.grid, self.num_bands, resolution, self.include_positions)
        _check_rows(input_shape, math.prod(self.grid))
        if self.combination == "add":
            self.projection = keras.layers.Dense(input_shape[-1], name="projection", dtype=self.dtype_policy)
            self.projection.build((None, *self.features.shape))

    def call(self, inputs: Tensor) -> Tensor:
        features = ops.convert_to_tensor(self.features[None], dtype=self.compute_dtype)
        if self.combination == "add":
            return inputs + self.projection(features)
        return _concatenate(inputs, features)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        if self.combination == "add":
            return tuple(input_shape)
        width = len(self.grid) * (2 * self.num_bands + self.include_positions)
        return (*input_shape[:-1], input_shape[-1] + width)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "grid": self.grid,
            "num_bands": self.num_bands,
            "max_resolution": self.max_resolution,
            "include_positions": self.include_positions,
            "combination": self.combination,
        }


@keras.saving.register_keras_serializable(package="perceiver")
class LearnedPositionEncoding(keras.layers.Layer):
    """Joins a learned vector to each row of a data array.

    Args:
        num_inputs: Number of rows M of the data array.
        dim: Width of the vectors with "concat"; None: the width C of the inputs, as always with "add".
        combination: "add" or "concat".
        init_std: Standard deviation of the truncated normal that initialises the vectors.

    Call: (B, M, C) -> (B, M, C + dim) with "concat", (B, M, C) with "add".

    Example:
        >>> LearnedPositionEncoding(16)(np.zeros((1, 16, 3))).shape
        (1, 16, 3)
    """

    def __init__(
        self,
        num_inputs: int,
        dim: int | None = None,
        combination: str = "add",
        init_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_inputs = num_inputs
        self.dim = dim
        self.combination = combination
        self.init_std = init_std

    def build(self, input_shape: Shape) -> None:
        _check_rows(input_shape, self.num_inputs)
        width = input_shape[-1] if self.dim is None or self.combination == "add" else self.dim
        self.positions = self.add_weight(
            shape=(self.num_inputs, width),
            initializer=keras.initializers.TruncatedNormal(stddev=self.init_std),
            name="positions",
        )

    def call(self, inputs: Tensor) -> Tensor:
        positions = ops.expand_dims(self.positions, 0)
        return inputs + positions if self.combination == "add" else _concatenate(inputs, positions)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        if self.combination == "add":
            return tuple(input_shape)
        return (*input_shape[:-1], input_shape[-1] + (input_shape[-1] if self.dim is None else self.dim))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_inputs": self.num_inputs,
            "dim": self.dim,
            "combination": self.combination,
            "init_std": self.init_std,
        }


def _concatenate(inputs: Tensor, positions: Tensor) -> Tensor:
    """Concatenates positions (1, M, P) to each of the inputs (B, M, C)."""
    shape = (ops.shape(inputs)[0], *positions.shape[1:])
    return ops.concatenate([inputs, ops.broadcast_to(ops.cast(positions, inputs.dtype), shape)], axis=-1)


def _check_rows(input_shape: Shape, num_inputs: int) -> None:
    if input_shape[1] != num_inputs:
        raise ValueError(f"the data array has {input_shape[1]} rows, its positions {num_inputs}: make them equal")
