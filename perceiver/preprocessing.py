"""From uint8 images to rows of the data array, on the device: normalisation, resizing, then pixels, patches or a stem.

Images are transferred as uint8. They are cast, normalised and resized here in the precision of the variables (float32
under mixed precision); the result, the input of the stem, is in the compute precision.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import layers, ops

from perceiver.freezing import LayerWithParts
from perceiver.implementations import implementations
from perceiver.whitening import patch_whitening

Shape = tuple[Any, ...]  # integers, None where a size is unknown


@keras.saving.register_keras_serializable(package="perceiver")
class ImageNormalization(keras.layers.Layer):
    """Standardises images with values in 0..255 by the mean and standard deviation of each channel, and resizes them.

    Args:
        mean: Mean of each channel, for values in 0..1; None: 0.5.
        std: Standard deviation of each channel, for values in 0..1; None: 0.5.
        size: Height and width of the result (bilinear); None keeps the size.

    Call: (B, H, W, channels), uint8 or floating -> (B, height, width, channels) in the compute dtype.

    Example:
        >>> ImageNormalization(size=(16, 16))(np.zeros((1, 8, 8, 3), "uint8")).shape
        (1, 16, 16, 3)
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.size = None if size is None else tuple(size)

    def build(self, input_shape: Shape) -> None:
        half = np.full(input_shape[-1], 0.5)
        mean = half if self.mean is None else np.array(self.mean)
        std = half if self.std is None else np.array(self.std)
        self.factor = (1 / (255 * std)).astype("float32")
        self.shift = (-mean / std).astype("float32")

    def call(self, images: Tensor) -> Tensor:
        x = ops.cast(images, self.variable_dtype) * self.factor + self.shift
        if self.size is not None and self.size != tuple(images.shape[1:3]):
            x = ops.image.resize(x, self.size, interpolation="bilinear", data_format="channels_last")
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape) if self.size is None else (input_shape[0], *self.size, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "mean": self.mean, "std": self.std, "size": self.size}


@keras.saving.register_keras_serializable(package="perceiver")
class PatchStem(LayerWithParts):
    """Cuts images into square patches, each a row of the data array, and projects them.

    Args:
        patch_size: Side of a patch in pixels; 1 makes every pixel a row.
        units: Width of the projection; None: no projection.
        whitening: Whether patches are decorrelated first (`perceiver.whitening`).

    Call: (B, H, W, channels) -> (B, H W / patch_size**2, units or patch_size**2 * channels).

    Example:
        >>> PatchStem(4, units=32)(np.zeros((1, 8, 8, 3))).shape
        (1, 4, 32)
    """

    def __init__(self, patch_size: int = 1, units: int | None = None, whitening: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.units = units
        self.whitening = whitening

    def build(self, input_shape: Shape) -> None:
        if self.units is not None:
            self.projection = layers.Dense(self.units, name="projection", dtype=self.dtype_policy)
            self.projection.build((None, None, self.patch_size**2 * input_shape[-1]))
        self.matrix = patch_whitening(self.patch_size, input_shape[-1]) if self.whitening else None
        self.freeze()

    def call(self, images: Tensor) -> Tensor:
        height, width, channels = images.shape[1:]
        p = self.patch_size
        x = images
        if p > 1:
            x = ops.reshape(x, (-1, height // p, p, width // p, p, channels))
            x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        x = ops.reshape(x, (-1, (height // p) * (width // p), p * p * channels))
        if self.matrix is None:
            return x if self.units is None else self.projection(x)
        matrix = ops.cast(self.matrix, self.compute_dtype)
        if self.units is None:
            return ops.matmul(x, matrix)
        # Both products in one: the two matrices are multiplied once a batch instead of once a row.
        return ops.matmul(x, ops.matmul(matrix, self.projection.kernel)) + self.projection.bias

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, height, width, channels = input_shape
        rows = (height // self.patch_size) * (width // self.patch_size)
        return batch, rows, self.patch_size**2 * channels if self.units is None else self.units

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "patch_size": self.patch_size, "units": self.units, "whitening": self.whitening}


@keras.saving.register_keras_serializable(package="perceiver")
class ConvStem(LayerWithParts):
    """3 x 3 convolutions, each followed by max-pooling with stride 2 and a ReLU; a cell of the last map is a row.

    Further convolutions may follow at the last size, each with a ReLU and a skip connection around it. Before them, the
    ReLU commutes with the pooling and comes after it, where it is a quarter of the work.

    Args:
        num_layers: Number of convolutions; each halves both sides.
        channels: Channels of every convolution but the last.
        units: Channels of the last convolution; None: `channels`.
        pool_size: Side of the pooling windows; above 2 they overlap.
        channel_growth: Factor by which channels grow from one convolution to the next, up to `channels`.
        num_residuals: Number of 3 x 3 convolutions after the last pooling.

    Call: (B, H, W, channels) -> (B, rows, units), where rows is the product of H / 2**num_layers and
    W / 2**num_layers, both rounded up.

    Example:
        >>> ConvStem(2, 8, units=32)(np.zeros((1, 8, 8, 3))).shape
        (1, 4, 32)
    """

    def __init__(
        self,
        num_layers: int = 2,
        channels: int = 64,
        units: int | None = None,
        pool_size: int = 2,
        channel_growth: int = 1,
        num_residuals: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_layers = num_layers
        self.channels = channels
        self.units = units
        self.pool_size = pool_size
        self.channel_growth = channel_growth
        self.num_residuals = num_residuals

    def build(self, input_shape: Shape) -> None:
        inner = [max(1, self.channels // self.channel_growth**i) for i in range(self.num_layers - 1)]
        widths = [*reversed(inner), self.units or self.channels]
        widths = [input_shape[-1], *widths]
        self.convolutions = [
            self._convolution(f"convolution_{i}", *pair) for i, pair in enumerate(itertools.pairwise(widths))
        ]
        self.residuals = [self._convolution(f"residual_{i}", widths[-1], widths[-1]) for i in range(self.num_residuals)]
        self.freeze()

    def _convolution(self, name: str, channels: int, filters: int) -> layers.Conv2D:
        convolution = layers.Conv2D(
            filters,
            3,
            padding="same",
            data_format="channels_last",
            kernel_initializer="he_normal",
            name=name,
            dtype=self.dtype_policy,
        )
        convolution.build((None, None, None, channels))
        return convolution

    def call(self, images: Tensor, training: bool | None = None) -> Tensor:
        x = images
        for convolution in self.convolutions:
            x = _convolve(convolution, x, training)
            x = ops.max_pool(x, self.pool_size, strides=2, padding="same", data_format="channels_last")
            x = ops.relu(x)
        for convolution in self.residuals:
            x = x + ops.relu(_convolve(convolution, x, training))
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3]))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, height, width, _ = input_shape
        cell = 2**self.num_layers
        return batch, -(-height // cell) * -(-width // cell), self.units or self.channels

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_layers": self.num_layers,
            "channels": self.channels,
            "units": self.units,
            "pool_size": self.pool_size,
            "channel_growth": self.channel_growth,
            "num_residuals": self.num_residuals,
        }


def _convolve(convolution: layers.Conv2D, x: Tensor, training: bool | None) -> Tensor:
    """What a convolution of the stem makes of `x`, in the compute dtype, by `Implementations.convolution`."""
    if not training or implementations().convolution == "library":
        return convolution(x)
    kernel, bias = (ops.cast(each, "float32") for each in (convolution.kernel, convolution.bias))
    y = ops.conv(ops.cast(x, "float32"), kernel, padding="same", data_format="channels_last") + bias
    return ops.cast(y, convolution.compute_dtype)
