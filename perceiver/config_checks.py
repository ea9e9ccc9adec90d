"""Checks of a `PerceiverConfig`: every value by itself, then those that must agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:
    from perceiver.config import PerceiverConfig

MOST_WHITENED = 4096
"""Values of a patch that may be whitened; the matrix then has 64 MiB."""


def check(config: PerceiverConfig) -> None:
    """Raises ValueError if a value is out of range or two values contradict each other."""
    _check_values(config)
    _check_image(config)
    _check_heads(config)


def _check_values(config: PerceiverConfig) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_args(hint) and all(isinstance(choice, str) for choice in get_args(hint)):
            _require(config, value in get_args(hint), name, f"choose one of {', '.join(get_args(hint))}")
        elif hint in (int, int | None) and name not in ("seed", "num_classes") and value is not None:
            least = 0 if name in ("input_mlp_widening_factor", "num_conv_residuals") else 1
            _require(config, value >= least, name, f"give at least {least}")
    _require(config, config.conv_pool_size >= 2, "conv_pool_size", "give at least 2, the stride")
    _require(config, config.num_classes >= 2, "num_classes", "give at least 2")
    is_shape = len(config.image_shape) == 3 and min(config.image_shape) >= 1
    _require(config, is_shape, "image_shape", "give height, width and channels, each at least 1")
    for name in ("dropout", "attention_dropout", "logits_dropout"):
        _require(config, 0 <= getattr(config, name) < 1, name, "give a rate in [0, 1)")
    for name in ("layer_norm_epsilon", "init_std"):
        _require(config, 0 < getattr(config, name) < math.inf, name, "give a positive number")
    channels = config.image_shape[2]
    for name in ("pixel_mean", "pixel_std"):
        value = getattr(config, name)
        if value is not None:
            _require(config, len(value) == channels, name, f"give one number for each of {channels} channels")
            _require(config, all(map(math.isfinite, value)), name, "give finite numbers")
    _require(config, config.pixel_std is None or min(config.pixel_std) > 0, "pixel_std", "give positive numbers")
    _require(config, config.seed is None or 0 <= config.seed < 2**31, "seed", "give a number in [0, 2**31)")
    if config.attention_dropout:
        chunk_size = config.attention_chunk_size
        remedy = f"set it to 0, since model.attention_chunk_size = {chunk_size} never holds the weights"
        _require(config, chunk_size is None, "attention_dropout", remedy)
        remedy = "set it to 0, since model.remat would draw another mask in the backward pass"
        _require(config, not config.remat, "attention_dropout", remedy)


def _require(config: PerceiverConfig, condition: bool, name: str, remedy: str) -> None:
    if not condition:
        raise ValueError(f"model.{name} = {getattr(config, name)}: {remedy}")


def _check_image(config: PerceiverConfig) -> None:
    height, width = config.resized_shape
    if config.stem == "patches" and math.gcd(height, width) % config.patch_size:
        choices = ", ".join(map(str, _divisors(math.gcd(height, width))))
        raise ValueError(
            f"model.patch_size = {config.patch_size} does not divide the image of {height} x {width} pixels: "
            f"choose one of {choices}"
        )
    if config.stem == "patches" and config.patch_whitening:
        values = config.patch_size**2 * config.image_shape[2]
        remedy = (
            f"whitening multiplies the {values:,} values of a patch by a square matrix: give smaller patches, at most "
        )
        remedy += f"{math.isqrt(MOST_WHITENED // config.image_shape[2])}, or set model.patch_whitening to False"
        _require(config, values <= MOST_WHITENED, "patch_size", remedy)
    if config.stem == "conv":
        remedy = "the conv stem has no patches: leave it off, or choose the stem pixels or patches"
        _require(config, not config.patch_whitening, "patch_whitening", remedy)
        most = (max(height, width) - 1).bit_length()
        remedy = f"an image of {height} x {width} pixels can be halved {most} times: give at most {most}"
        _require(config, config.num_conv_layers <= most, "num_conv_layers", remedy)


def _check_heads(config: PerceiverConfig) -> None:
    data_width = "the width of the data array" if config.data_dim is None or config.joins else "model.data_dim"
    widths = [
        ("num_cross_attention_heads", "cross_attention_qk_dim", config.cross_qk_dim, data_width),
        ("num_cross_attention_heads", "cross_attention_v_dim", config.cross_v_dim, "model.cross_attention_qk_dim"),
        ("num_self_attention_heads", "self_attention_qk_dim", config.self_qk_dim, "model.latent_dim"),
        ("num_self_attention_heads", "self_attention_v_dim", config.self_v_dim, "model.self_attention_qk_dim"),
    ]
    if config.head == "query":
        widths.append(("num_cross_attention_heads", "latent_dim", config.latent_dim, ""))
    for heads_name, width_name, width, source in widths:
        heads = getattr(config, heads_name)
        if width % heads:
            origin = f" (= {source})" if getattr(config, width_name) is None else ""
            choices = ", ".join(map(str, _divisors(width)))
            raise ValueError(
                f"model.{heads_name} = {heads} does not divide model.{width_name} = {width}{origin}: "
                f"choose one of {choices}"
            )
    if not config.cross_attention_output_projection and config.cross_v_dim != config.latent_dim:
        raise ValueError(
            f"model.cross_attention_v_dim = {config.cross_v_dim}: without an output projection it has to be "
            f"model.latent_dim = {config.latent_dim}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
