"""Presets: parameter counts of the papers, and no defect of the published example except in `keras_example`."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest

from perceiver import Perceiver, PerceiverConfig, presets
from perceiver.cost import macs_per_image, parameter_count

PRESETS: dict[str, Callable[[], PerceiverConfig]] = {
    name: value
    for name, value in vars(presets).items()
    if inspect.isfunction(value) and value.__module__ == presets.__name__ and not inspect.signature(value).parameters
}
FIXED = {name: preset for name, preset in PRESETS.items() if name != "keras_example"}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (presets.perceiver_io_imagenet(), 48_440_627),
        (presets.paper_imagenet(), 44_912_254),
        (replace(presets.paper_imagenet(), share_first_latent_transformer=False), 82_722_430),
        (replace(presets.paper_imagenet(), share_weights=False), 326_241_856),
        (presets.keras_example(), 9_697_637),
    ],
    ids=["Perceiver IO", "paper", "first latent transformer unshared", "nothing shared", "Keras example"],
)
def test_parameters_are_the_published_ones(config: PerceiverConfig, parameters: int) -> None:
    """`test_cost.py` compares the closed form with built models for the same kinds of sharing."""
    assert parameter_count(config) == parameters


@pytest.mark.parametrize("preset", [presets.keras_example, presets.perceiver_io_imagenet])
def test_built_model_has_as_many(preset: Callable[[], PerceiverConfig]) -> None:
    model = Perceiver(**asdict(preset()))
    model.build()
    assert model.count_params() == parameter_count(preset())


def test_imagenet_models_apply_48_self_attends() -> None:
    """Shared repetitions do not change the parameter count, but they change the multiply-accumulates."""
    n, d = 512, 1024
    one = n * (4 * d * d + 2 * n * d + 2 * d * d)
    for preset in (presets.paper_imagenet(), presets.perceiver_io_imagenet()):
        fewer = replace(preset, num_self_attention_blocks=5)
        assert macs_per_image(preset) - macs_per_image(fewer) == 8 * one
        assert preset.data_width == 261


def test_imagenet_presets_attend_to_the_image_eight_times_and_once() -> None:
    assert presets.paper_imagenet().cross_attend_order == (0, 1, 1, 1, 1, 1, 1, 1)
    assert presets.perceiver_io_imagenet().cross_attend_order == (0,)
    assert presets.perceiver_io_imagenet().head == "query"


@pytest.mark.parametrize("preset", FIXED.values(), ids=FIXED)
def test_no_defect_of_the_published_example(preset: Callable[[], PerceiverConfig]) -> None:
    config = preset()
    assert config.residual == "input"
    assert config.cross_attention_scale == "inverse_sqrt"
    assert config.cross_attention_output_projection
    assert config.self_qk_dim == config.latent_dim  # the heads divide the width among them
    assert config.logits_dropout == 0
    assert config.resize_to is None


def test_fixed_example_is_as_large_as_the_published_one() -> None:
    fixed, example = presets.keras_example_fixed(), presets.keras_example()
    assert fixed.num_inputs == example.num_inputs == 1024
    assert fixed.data_width == example.data_width
    for name in ("num_latents", "latent_dim", "num_iterations", "num_self_attention_blocks", "head_hidden_dim"):
        assert getattr(fixed, name) == getattr(example, name)
    assert fixed.self_qk_dim // fixed.num_self_attention_heads == 32
    assert macs_per_image(example) > 4 * macs_per_image(fixed)


# Side: tokens, channels of the convolutions, thousands of parameters and MMAC an image, for 100 classes.
SIZES = {
    8: (4, (64, 192), 2250, 16.9),
    16: (16, (64, 192), 2252, 28.4),
    32: (64, (64, 192), 2261, 74.3),
    48: (144, (64, 192), 2277, 150.8),
    64: (256, (64, 192), 2298, 258.0),
    96: (144, (32, 64, 192), 2294, 197.3),
    128: (256, (32, 64, 192), 2316, 340.5),
    224: (196, (16, 32, 64, 192), 2309, 332.4),
    256: (256, (16, 32, 64, 192), 2320, 430.2),
}


@pytest.mark.parametrize(("side", "expected"), SIZES.items())
def test_the_stem_follows_the_size_of_the_images(side: int, expected: tuple[int, tuple[int, ...], int, float]) -> None:
    tokens, widths, parameters, mmacs = expected
    config = presets.for_images(presets.cifar100(), (side, side, 3), 100)
    assert (config.num_inputs, config.conv_widths) == (tokens, (3, *widths))
    assert round(parameter_count(config) / 1e3) == parameters
    assert round(macs_per_image(config) / 1e6, 1) == mmacs
    grey = presets.for_images(presets.cifar100(), (side, side, 1), 100)
    assert parameter_count(config) - parameter_count(grey) == 2 * 9 * widths[0]


@pytest.mark.parametrize(
    ("shape", "patch_size", "resize_to", "tokens"),
    [
        ((32, 32), 4, None, 64),
        ((8, 8), 2, None, 16),
        ((3, 3), 1, None, 9),
        ((64, 64), 4, None, 256),
        ((96, 96), 8, None, 144),
        ((224, 224), 16, None, 196),
        ((100, 75), 8, 88, 121),
        ((30, 34), 4, 32, 64),
        ((33, 250), 8, 88, 121),
        ((2, 500), 2, None, 250),
        ((2000, 3000), 16, 256, 256),
    ],
)
def test_patches_follow_the_size_of_the_images(
    shape: tuple[int, int], patch_size: int, resize_to: int | None, tokens: int
) -> None:
    config = presets.for_images(presets.cifar100_pixels(), (*shape, 3), 100)
    assert (config.patch_size, config.resize_to, config.num_inputs) == (patch_size, resize_to, tokens)
    example = presets.for_images(presets.keras_example(), (*shape, 3), 100)
    assert (example.patch_size, example.resize_to) == (2, 64), "a preset that resizes stays as it is"


@pytest.mark.parametrize(("num_classes", "num_latents"), [(2, 8), (10, 8), (100, 8), (101, 16), (1000, 16)])
def test_latents_follow_the_number_of_classes(num_classes: int, num_latents: int) -> None:
    config = presets.for_images(presets.cifar100(), (64, 64, 3), num_classes)
    assert (config.num_latents, config.num_classes) == (num_latents, num_classes)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("shape", [(100, 75, 3), (33, 250, 1)], ids=str)
def test_presets_take_images_of_any_size(preset: Callable[[], PerceiverConfig], shape: tuple[int, int, int]) -> None:
    config = presets.for_images(preset(), shape, 7)
    assert (config.image_shape, config.num_classes) == (shape, 7)
    if config.num_inputs <= 256:  # not for `pixels`, nor for the published example
        assert config.num_inputs > 64
        model = Perceiver(**asdict(replace(config, num_iterations=1, num_self_attention_blocks=1, latent_dim=8)))
        assert model(np.zeros((2, *shape), np.uint8)).shape == (2, 7)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_docstring_states_the_cost(preset: Callable[[], PerceiverConfig]) -> None:
    cost = f"{parameter_count(preset()):,} parameters, {macs_per_image(preset()) / 1e6:,.1f} MMAC an image"
    assert cost in str(preset.__doc__)
