"""Settings of the Perceiver: one frozen dataclass that validates itself.

It imports neither Keras nor NumPy, so that a command line or a cost estimate, which need only the settings, start fast.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


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
    num_conv_layers: int = 2
    """3 x 3 convolutions in the `conv` stem; each is followed by a max-pooling that halves both sides, rounded up."""
    conv_channels: int = 64
    """Channels of every convolution of the `conv` stem but the last, which has `data_dim` channels."""
    conv_channel_growth: int = 1
    """Factor by which channels grow from one convolution of the `conv` stem to the next, up to `conv_channels`."""
    conv_pool_size: int = 2
    """Side of the max-pooling windows of the `conv` stem; the stride is 2, so that larger windows overlap."""
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
        self._check_values()
        self._check_image()
        self._check_heads()

    def _check_values(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_args(hint) and all(isinstance(choice, str) for choice in get_args(hint)):
                self._require(value in get_args(hint), name, f"choose one of {', '.join(get_args(hint))}")
            elif hint in (int, int | None) and name not in ("seed", "num_classes") and value is not None:
                least = 0 if name == "input_mlp_widening_factor" else 1
                self._require(value >= least, name, f"give at least {least}")
        self._require(self.conv_pool_size >= 2, "conv_pool_size", "give at least 2, the stride")
        self._require(self.num_classes >= 2, "num_classes", "give at least 2")
        is_shape = len(self.image_shape) == 3 and min(self.image_shape) >= 1
        self._require(is_shape, "image_shape", "give height, width and channels, each at least 1")
        for name in ("dropout", "attention_dropout", "logits_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "give a rate in [0, 1)")
        for name in ("layer_norm_epsilon", "init_std"):
            self._require(0 < getattr(self, name) < math.inf, name, "give a positive number")
        channels = self.image_shape[2]
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            if value is not None:
                self._require(len(value) == channels, name, f"give one number for each of {channels} channels")
                self._require(all(map(math.isfinite, value)), name, "give finite numbers")
        self._require(self.pixel_std is None or min(self.pixel_std) > 0, "pixel_std", "give positive numbers")
        self._require(self.seed is None or 0 <= self.seed < 2**31, "seed", "give a number in [0, 2**31)")
        if self.attention_dropout:
            chunk_size = self.attention_chunk_size
            remedy = f"set it to 0, since model.attention_chunk_size = {chunk_size} never holds the weights"
            self._require(chunk_size is None, "attention_dropout", remedy)
            remedy = "set it to 0, since model.remat would draw another mask in the backward pass"
            self._require(not self.remat, "attention_dropout", remedy)

    def _require(self, condition: bool, name: str, remedy: str) -> None:
        if not condition:
            raise ValueError(f"model.{name} = {getattr(self, name)}: {remedy}")

    def _check_image(self) -> None:
        height, width = self.resized_shape
        if self.stem == "patches" and math.gcd(height, width) % self.patch_size:
            choices = ", ".join(map(str, _divisors(math.gcd(height, width))))
            raise ValueError(
                f"model.patch_size = {self.patch_size} does not divide the image of {height} x {width} pixels: "
                f"choose one of {choices}"
            )
        if self.stem == "conv":
            most = (max(height, width) - 1).bit_length()
            remedy = f"an image of {height} x {width} pixels can be halved {most} times: give at most {most}"
            self._require(self.num_conv_layers <= most, "num_conv_layers", remedy)

    def _check_heads(self) -> None:
        data_width = "the width of the data array" if self.data_dim is None or self._joins else "model.data_dim"
        widths = [
            ("num_cross_attention_heads", "cross_attention_qk_dim", self.cross_qk_dim, data_width),
            ("num_cross_attention_heads", "cross_attention_v_dim", self.cross_v_dim, "model.cross_attention_qk_dim"),
            ("num_self_attention_heads", "self_attention_qk_dim", self.self_qk_dim, "model.latent_dim"),
            ("num_self_attention_heads", "self_attention_v_dim", self.self_v_dim, "model.self_attention_qk_dim"),
        ]
        if self.head == "query":
            widths.append(("num_cross_attention_heads", "latent_dim", self.latent_dim, ""))
        for heads_name, width_name, width, source in widths:
            heads = getattr(self, heads_name)
            if width % heads:
                origin = f" (= {source})" if getattr(self, width_name) is None else ""
                choices = ", ".join(map(str, _divisors(width)))
                raise ValueError(
                    f"model.{heads_name} = {heads} does not divide model.{width_name} = {width}{origin}: "
                    f"choose one of {choices}"
                )
        if not self.cross_attention_output_projection and self.cross_v_dim != self.latent_dim:
            raise ValueError(
                f"model.cross_attention_v_dim = {self.cross_v_dim}: without an output projection it has to be "
                f"model.latent_dim = {self.latent_dim}"
            )

    @property
    def _joins(self) -> bool:
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
        if self._joins and self.learned_position_dim is not None:
            return self.learned_position_dim
        return self.projected_dim

    @property
    def data_width(self) -> int:
        """Width C of the data array."""
        return self.projected_dim + (self.position_dim if self._joins else 0)

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


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
