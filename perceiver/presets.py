"""Named configs, and `for_images`, which fits one to images of another size and to another number of classes.

Each config is a function whose docstring describes the model and its cost. The rule of `for_images`:

    tokens     the `conv` stem gets further convolutions, each of which halves both sides, until it gives at most 256
               tokens; it never has fewer than the preset
    patches    the `patches` stem without a size to resize to gets patches of twice the side, at most 16 pixels, until
               they are at most 256, or of half the side, until they are at least 4 in each direction; images that
               patches do not divide, or that are too large even so, are resized to a square
    channels   if the `conv` stem gets further convolutions, channels double from one to the next, so
               that each costs about the same
    latents    twice as many for each factor of ten that the classes exceed 100, rounded up
"""

import math
from dataclasses import replace
from typing import TypeVar

from perceiver.config import PerceiverConfig

MOST_TOKENS = 256
FEWEST_PATCHES = 4  # in each direction
LARGEST_PATCH = 16  # side in pixels, that of Dosovitskiy et al. (2021)
FEW_CLASSES = 100
Config = TypeVar("Config", bound=PerceiverConfig)


def for_images(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> Config:
    """`config` for images of any size, with one channel or several, and any number of classes, by the module's rule.

    The `pixels` stem stays as it is.

    Args:
        config: A preset.
        image_shape: Height, width and channels.
        num_classes: Number of classes.
    """
    patch_size, resize_to = config.patch_size, config.resize_to
    if config.stem == "patches" and resize_to is None:
        patch_size, resize_to = _patches(patch_size, *image_shape[:2])
    fitted = replace(
        config, image_shape=image_shape, num_classes=num_classes, patch_size=patch_size, resize_to=resize_to
    )
    while fitted.stem == "conv" and fitted.num_inputs > MOST_TOKENS:
        fitted = replace(fitted, num_conv_layers=fitted.num_conv_layers + 1, conv_channel_growth=2)
    doublings = max(0, math.ceil(math.log10(num_classes / FEW_CLASSES)))
    return replace(fitted, num_latents=fitted.num_latents * 2**doublings)


def _patches(size: int, height: int, width: int) -> tuple[int, int | None]:
    """`patch_size` and `resize_to` with which patches of about this size are few enough and many enough."""

    def tokens(size: int) -> int:
        return -(-height // size) * -(-width // size)

    while tokens(size) > MOST_TOKENS and size < LARGEST_PATCH:
        size *= 2
    while size > 1 and min(height, width) < FEWEST_PATCHES * size and tokens(size // 2) <= MOST_TOKENS:
        size //= 2
    if height % size == 0 and width % size == 0 and tokens(size) <= MOST_TOKENS:
        return size, None
    side = max(1, min(round(math.sqrt(height * width) / size), math.isqrt(MOST_TOKENS)))
    return size, side * size


def quickstart() -> PerceiverConfig:
    """scikit-learn's digits, 8 x 8 x 1: 16 cells of a convolutional stem, 8 latents, all weights shared.

    70,026 parameters, 1.1 MMAC an image. It reaches 0.97 top-1 on the validation rows in 15 s on one core
    (docs/results.md).
    """
    return PerceiverConfig(
        image_shape=(8, 8, 1),
        num_classes=10,
        num_conv_layers=1,
        data_dim=64,
        num_latents=8,
        latent_dim=64,
        num_self_attention_blocks=1,
        num_cross_attention_heads=2,
        cross_attention_widening_factor=2,
        self_attention_widening_factor=2,
        share_first_cross_attention=True,
        dropout=0.2,
        use_final_layer_norm=True,
    )


def cifar100() -> PerceiverConfig:
    """CIFAR-100 from 32 x 32 pixels: 64 cells of a convolutional stem, 8 latents of 192, no shared weights.

    The stem has a third convolution beside a skip connection, and each latent's heads of the cross-attention start
    beside its place in the image (`perceiver.spatial_prior`).

    2,261,476 parameters, 74.3 MMAC an image.
    """
    return PerceiverConfig(
        conv_pool_size=3,
        num_conv_residuals=1,
        data_dim=192,
        num_latents=8,
        latent_dim=192,
        num_cross_attention_heads=8,
        cross_attention_widening_factor=2,
        self_attention_widening_factor=2,
        cross_attention_prior=True,
        share_weights=False,
        share_first_cross_attention=True,
        use_final_layer_norm=True,
    )


def cifar100_pixels() -> PerceiverConfig:
    """CIFAR-100 without a convolution: 64 whitened patches of 4 x 4 pixels, 8 latents of 192, no shared weights.

    A row of the data array sees its own patch and its position; only attention mixes rows.

    1,974,756 parameters, 33.0 MMAC an image.
    """
    return PerceiverConfig(
        stem="patches",
        patch_whitening=True,
        conv_pool_size=3,  # no convolution has it, but the keys of finished runs do
        data_dim=192,
        input_mlp_widening_factor=2,
        num_latents=8,
        latent_dim=192,
        num_cross_attention_heads=8,
        cross_attention_widening_factor=2,
        self_attention_widening_factor=2,
        cross_attention_prior=True,
        share_weights=False,
        share_first_cross_attention=True,
        use_final_layer_norm=True,
    )


def cifar100_gpu() -> PerceiverConfig:
    """CIFAR-100 on one GPU: 32 latents of 384, four self-attends after each cross-attend, shared; not yet trained.

    6,024,036 parameters, 448.2 MMAC an image.
    """
    return PerceiverConfig(
        conv_channels=128,
        conv_pool_size=3,
        data_dim=256,
        num_latents=32,
        latent_dim=384,
        num_self_attention_blocks=4,
        num_cross_attention_heads=8,
        num_self_attention_heads=8,
        cross_attention_widening_factor=2,
        self_attention_widening_factor=2,
        share_first_cross_attention=True,
        dropout=0.1,
        use_final_layer_norm=True,
    )


def cifar100_8gpu() -> PerceiverConfig:
    """CIFAR-100 on eight GPUs: 64 latents of 512, three iterations of six self-attends, shared; not yet trained.

    15,138,404 parameters, 2,971.8 MMAC an image.
    """
    return replace(
        cifar100_gpu(),
        conv_channels=192,
        data_dim=384,
        num_latents=64,
        latent_dim=512,
        num_iterations=3,
        num_self_attention_blocks=6,
        dropout=0.2,
    )


def keras_example() -> PerceiverConfig:
    """The same function and sizes as the published Keras example, as a baseline.

    9,697,637 parameters, 7,217.4 MMAC an image (7,351.7 in the example, which computes keys and values in each
    iteration).
    """
    return PerceiverConfig(
        resize_to=64,
        stem="patches",
        patch_size=2,
        data_dim=256,
        num_latents=256,
        latent_dim=256,
        num_iterations=2,
        num_self_attention_blocks=4,
        num_cross_attention_heads=1,
        num_self_attention_heads=8,
        self_attention_qk_dim=2048,
        share_first_cross_attention=True,
        dropout=0.2,
        attention_dropout=0.1,
        dropout_after_attention=False,
        head_hidden_dim=256,
        logits_dropout=0.2,
        residual="normalised",
        cross_attention_scale="learned",
        cross_attention_output_projection=False,
        layer_norm_epsilon=1e-6,
        init_std=0.05,
    )


def keras_example_fixed() -> PerceiverConfig:
    """The published Keras example with its defects fixed, at the same size.

    It has pixels instead of 2 x 2 patches of an upsampled image (1,024 inputs in both), heads of 32 instead of 256, two
    heads in the cross-attention (each further one would cost another softmax over 256 x 1,024 weights), scaled logits,
    skip connections that carry their input, an output projection, and no dropout on the logits.

    2,400,100 parameters, 1,611.5 MMAC an image.
    """
    return replace(
        keras_example(),
        resize_to=None,
        stem="pixels",
        num_cross_attention_heads=2,
        self_attention_qk_dim=None,
        attention_dropout=0.0,
        dropout_after_attention=True,
        logits_dropout=0.0,
        residual="input",
        cross_attention_scale="inverse_sqrt",
        cross_attention_output_projection=True,
        use_final_layer_norm=True,
        layer_norm_epsilon=1e-5,
        init_std=0.02,
    )


def paper_imagenet() -> PerceiverConfig:
    """The paper's best ImageNet model: 8 cross-attends, the first one unshared, and 6 self-attends after each.

    44,912,254 parameters, 312,123.1 MMAC an image.
    """
    return PerceiverConfig(
        image_shape=(224, 224, 3),
        num_classes=1000,
        stem="pixels",
        data_dim=None,
        position_encoding="fourier",
        position_combination="concat",
        num_fourier_bands=64,
        num_latents=512,
        latent_dim=1024,
        num_iterations=8,
        num_self_attention_blocks=6,
        num_self_attention_heads=8,
    )


def perceiver_io_imagenet() -> PerceiverConfig:
    """Perceiver IO on ImageNet with Fourier features: one cross-attend, then 8 times 6 self-attends, a query head.

    48,440,627 parameters, 203,062.4 MMAC an image.
    """
    return replace(paper_imagenet(), num_iterations=1, num_self_attention_repeats=8, head="query")
