"""Settings of the Perceiver: one frozen dataclass that validates itself.

It imports neither Keras nor NumPy, so that a command line or a cost estimate, which need only the settings, start fast.
"""

import math
from dataclasses import dataclass
from typing import Literal

from perceiver.config_checks import check


@dataclass(frozen=True)
class PerceiverConfig:
    """Shape of a Perceiver image classifier (Jaegle et al., 2021, arXiv:2103.03206).

    The letters are the paper's: the data array is M x C, the latent array N x D. Widths that are None follow the paper:
    those of the cross-attention are the width of the data array, those of the self-attention that of the latents.

    Raises:
        ValueError: if a value is out of range or two values contradict each other; the message names them and a remedy.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    """Height, width and channels of the uint8 input images; comes from the data source."""
    num_classes: int = 100
    """Number of classes; comes from the data source."""
    pixel_mean: tuple[float, ...] | None = None
    """Mean of each channel over the training rows, in [0, 1]; comes from the data. None: 0.5."""
    pixel_std: tuple[float, ...] | None = None
    """Standard deviation of each channel over the training rows, in [0, 1]; comes from the data. None: 0.5."""

    resize_to: int | None = None
    """Side in pixels to which images are resized (bilinear) on the device before the stem; None keeps their size."""
    stem: Literal["pixels", "patches", "conv"] = "conv"
    """What becomes a row of the data array: a pixel, a patch, or a cell of a small convolutional feature map."""
    patch_size: int = 4
    """Side in pixels of a square patch, for the `patches` stem."""
    patch_whitening: bool = False
    """Whether the `pixels` and `patches` stems decorrelate each row by the covariance of natural images."""
    num_conv_layers: int = 2
    """3 x 3 convolutions in the `conv` stem; each is followed by a max-pooling that halves both sides, rounded up."""
    conv_channels: int = 64
    """Channels of every convolution of the `conv` stem but the last, which has `data_dim` channels."""
    conv_channel_growth: int = 1
    """Factor by which channels grow from one convolution of the `conv` stem to the next, up to `conv_channels`."""
    conv_pool_size: int = 2
    """Side of the max-pooling windows of the `conv` stem; the stride is 2, so that larger windows overlap."""
    num_conv_residuals: int = 0
    """3 x 3 convolutions of the `conv` stem after its last pooling, each with a skip connection around it."""
    data_dim: int | None = 128
    """Width to which rows of the data array are projected before positions are joined; None keeps the stem's width."""
    position_encoding: Literal["fourier", "learned", "none"] = "learned"
    """Position encoding of the data array."""
    position_combination: Literal["add", "concat"] = "add"
    """Whether position encodings are added to the projected inputs or concatenated to them."""
    num_fourier_bands: int = 16
    """Number K of frequencies per dimension of the Fourier position encoding."""
    fourier_max_resolution: int | None = None
    """Highest sampling rate of the Fourier position encoding; None: the size of the grid in each dimension."""
    include_positions: bool = True
    """Whether the Fourier position encoding contains the positions themselves."""
    learned_position_dim: int | None = None
    """Width of learned positions that are concatenated; None: the width of the inputs."""
    input_mlp_widening_factor: int = 0
    """Hidden width of an MLP on each row of the data array by itself, in multiples of C; 0: no such MLP."""

    num_latents: int = 32
    """Number N of latents."""
    latent_dim: int = 128
    """Width D of a latent."""
    num_iterations: int = 2
    """Number of cross-attends, each followed by a latent transformer."""
    num_self_attention_blocks: int = 2
    """Self-attention blocks in a latent transformer."""
    num_self_attention_repeats: int = 1
    """How many times a latent transformer is applied, with the same weights, after each cross-attend."""
    num_cross_attention_heads: int = 1
    """Heads of the cross-attention."""
    num_self_attention_heads: int = 4
    """Heads of the self-attention."""
    cross_attention_qk_dim: int | None = None
    """Total width of queries and keys in the cross-attention; None: C."""
    cross_attention_v_dim: int | None = None
    """Total width of values in the cross-attention; None: its qk width."""
    self_attention_qk_dim: int | None = None
    """Total width of queries and keys in the self-attention; None: D."""
    self_attention_v_dim: int | None = None
    """Total width of values in the self-attention; None: its qk width."""
    cross_attention_widening_factor: int = 1
    """Hidden width of the MLP after a cross-attention, in multiples of D."""
    self_attention_widening_factor: int = 1
    """Hidden width of the MLP after a self-attention, in multiples of D."""
    cross_attention_prior: bool = False
    """Whether each head of each latent starts to look at a place of its own in the grid, by a learned Gaussian."""
    share_weights: bool = True
    """Whether iterations share their weights; false gives every cross-attend and latent transformer its own."""
    share_first_cross_attention: bool = False
    """Whether the first cross-attend uses the shared weights too; in the paper's best ImageNet model it does not."""
    share_first_latent_transformer: bool = True
    """Whether the first latent transformer uses the shared weights too."""
    dropout: float = 0.0
    """Dropout rate after each attention's output projection and each MLP."""
    attention_dropout: float = 0.0
    """Dropout rate on the attention weights."""
    dropout_after_attention: bool = True
    """Whether `dropout` applies after attention too; false applies it after each MLP only."""
    seed: int | None = None
    """Seed of the dropout masks; None: a random one."""
    head: Literal["average", "query"] = "average"
    """How latents become logits: their mean and a linear layer, or a learned output query that attends to them."""
    zero_init_logits: bool = False
    """Whether the last linear layer starts at zero."""
    head_hidden_dim: int | None = None
    """Width of a GELU layer between the pooled latents and the logits; None: no such layer."""
    logits_dropout: float = 0.0
    """Dropout rate on the logits; only the published Keras example uses it."""
    use_final_layer_norm: bool = False
    """Whether the latents are normalised once more before the head."""

    residual: Literal["input", "normalised"] = "input"
    """What skip connections of the cross-attention carry; "normalised", the Keras example's, is no identity path."""
    cross_attention_scale: Literal["inverse_sqrt", "learned"] = "inverse_sqrt"
    """Factor on the logits of the cross-attention: 1/sqrt(head width), or a learned scalar that starts at 1."""
    cross_attention_output_projection: bool = True
    """Whether the cross-attention ends with a linear layer; without it, its value width has to be D."""
    approximate_gelu: bool = False
    """Whether GELU is the tanh approximation, which is faster on some machines, or exact."""
    layer_norm_epsilon: float = 1e-5
    """Epsilon of every LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of the truncated normal that initialises latents and learned positions."""

    attention_chunk_size: int | None = None
    """Rows of the data array that the cross-attention processes at once, in an online softmax; None: all of them."""
    remat: bool = False
    """Whether attention and MLPs are recomputed in the backward pass, to save memory."""

    def __post_init__(self) -> None:
        for name in ("image_shape", "pixel_mean", "pixel_std"):  # JSON has no tuples
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check(self)

    @property
    def joins(self) -> bool:
        """Whether positions are concatenated to the inputs."""
        return self.position_encoding != "none" and self.position_combination == "concat"

    @property
    def resized_shape(self) -> tuple[int, int]:
        """Height and width of the images after resizing."""
        return self.image_shape[:2] if self.resize_to is None else (self.resize_to, self.resize_to)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of cells that the data array flattens."""
        height, width = self.resized_shape
        cell = {"pixels": 1, "patches": self.patch_size, "conv": 2**self.num_conv_layers}[self.stem]
        return -(-height // cell), -(-width // cell)

    @property
    def num_inputs(self) -> int:
        """Rows M of the data array."""
        return math.prod(self.grid)

    @property
    def conv_widths(self) -> tuple[int, ...]:
        """Channels before, between and after the convolutions of the `conv` stem."""
        inner = [max(1, self.conv_channels // self.conv_channel_growth**i) for i in range(self.num_conv_layers - 1)]
        return self.image_shape[2], *reversed(inner), self.projected_dim

    @property
    def projected_dim(self) -> int:
        """Width of the inputs before positions are joined."""
        if self.data_dim is not None:
            return self.data_dim
        channels = self.image_shape[2]
        return {"pixels": channels, "patches": self.patch_size**2 * channels, "conv": self.conv_channels}[self.stem]

    @property
    def position_dim(self) -> int:
        """Width of the position encoding before it is added or concatenated."""
        if self.position_encoding == "none":
            return 0
        if self.position_encoding == "fourier":
            return 4 * self.num_fourier_bands + 2 * self.include_positions
        if self.joins and self.learned_position_dim is not None:
            return self.learned_position_dim
        return self.projected_dim

    @property
    def data_width(self) -> int:
        """Width C of the data array."""
        return self.projected_dim + (self.position_dim if self.joins else 0)

    @property
    def cross_qk_dim(self) -> int:
        """Width of queries and keys in the cross-attention, all heads together."""
        return self.data_width if self.cross_attention_qk_dim is None else self.cross_attention_qk_dim

    @property
    def cross_v_dim(self) -> int:
        """Width of values in the cross-attention, all heads together."""
        return self.cross_qk_dim if self.cross_attention_v_dim is None else self.cross_attention_v_dim

    @property
    def self_qk_dim(self) -> int:
        """Width of queries and keys in the self-attention, all heads together."""
        return self.latent_dim if self.self_attention_qk_dim is None else self.self_attention_qk_dim

    @property
    def self_v_dim(self) -> int:
        """Width of values in the self-attention, all heads together."""
        return self.self_qk_dim if self.self_attention_v_dim is None else self.self_attention_v_dim

    @property
    def cross_attend_order(self) -> tuple[int, ...]:
        """For each iteration, the index of the cross-attend weights that it uses."""
        return self._order(self.share_first_cross_attention)

    @property
    def latent_transformer_order(self) -> tuple[int, ...]:
        """For each iteration, the index of the latent transformer weights that it uses."""
        return self._order(self.share_first_latent_transformer)

    def _order(self, share_first: bool) -> tuple[int, ...]:
        if not self.share_weights:
            return tuple(range(self.num_iterations))
        return tuple(0 if share_first else min(i, 1) for i in range(self.num_iterations))


def prior_width(grid: tuple[int, int]) -> int:
    """By how much the queries and keys of a head are wider with a `SpatialPrior` of this grid; it says why."""
    return 4 if max(grid) <= 8 else 9
