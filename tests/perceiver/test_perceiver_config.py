"""`PerceiverConfig`: messages of invalid values, derived widths, weight sharing, JSON."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
from tiny_perceivers import BASE, TINY

from perceiver import PerceiverConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_self_attention_heads": 5},
            "model.num_self_attention_heads = 5 does not divide model.self_attention_qk_dim = 12 "
            "(= model.latent_dim): choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"num_cross_attention_heads": 3},
            "model.num_cross_attention_heads = 3 does not divide model.cross_attention_qk_dim = 8 "
            "(= model.data_dim): choose one of 1, 2, 4, 8",
        ),
        (
            {"num_cross_attention_heads": 2, "cross_attention_v_dim": 7},
            "model.num_cross_attention_heads = 2 does not divide model.cross_attention_v_dim = 7: choose one of 1, 7",
        ),
        (
            {"num_cross_attention_heads": 5, "cross_attention_qk_dim": 5, "head": "query"},
            "model.num_cross_attention_heads = 5 does not divide model.latent_dim = 12: "
            "choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            {"patch_size": 3},
            "model.patch_size = 3 does not divide the image of 8 x 8 pixels: choose one of 1, 2, 4, 8",
        ),
        (
            {"stem": "conv", "num_conv_layers": 4},
            "model.num_conv_layers = 4: an image of 8 x 8 pixels can be halved 3 times: give at most 3",
        ),
        (
            {"cross_attention_output_projection": False},
            "model.cross_attention_v_dim = 8: without an output projection it has to be model.latent_dim = 12",
        ),
        (
            {"attention_dropout": 0.1, "attention_chunk_size": 4},
            "model.attention_dropout = 0.1: set it to 0, since model.attention_chunk_size = 4 never holds the weights",
        ),
        (
            {"attention_dropout": 0.1, "remat": True},
            "model.attention_dropout = 0.1: set it to 0, since model.remat would draw another mask in the backward "
            "pass",
        ),
        ({"num_latents": 0}, "model.num_latents = 0: give at least 1"),
        ({"conv_pool_size": 1}, "model.conv_pool_size = 1: give at least 2, the stride"),
        ({"attention_chunk_size": 0}, "model.attention_chunk_size = 0: give at least 1"),
        ({"num_classes": 1}, "model.num_classes = 1: give at least 2"),
        ({"dropout": 1.0}, "model.dropout = 1.0: give a rate in [0, 1)"),
        ({"dropout": math.nan}, "model.dropout = nan: give a rate in [0, 1)"),
        ({"attention_dropout": -0.1}, "model.attention_dropout = -0.1: give a rate in [0, 1)"),
        ({"layer_norm_epsilon": math.inf}, "model.layer_norm_epsilon = inf: give a positive number"),
        ({"seed": -1}, "model.seed = -1: give a number in [0, 2**31)"),
        ({"stem": "vit"}, "model.stem = vit: choose one of pixels, patches, conv"),
        ({"image_shape": (8, 8)}, "model.image_shape = (8, 8): give height, width and channels, each at least 1"),
        ({"pixel_mean": (0.5,)}, "model.pixel_mean = (0.5,): give one number for each of 3 channels"),
        ({"pixel_std": (0.5, 0.0, 0.5)}, "model.pixel_std = (0.5, 0.0, 0.5): give positive numbers"),
        ({"pixel_mean": (0.5, math.nan, 0.5)}, "model.pixel_mean = (0.5, nan, 0.5): give finite numbers"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        replace(BASE, **changes)
    assert str(error.value) == message


def test_widths_follow_the_paper() -> None:
    config = TINY["pixels"]
    assert (config.grid, config.num_inputs) == ((6, 4), 24)
    assert config.data_width == 1 + 2 * (2 * 3 + 1)  # the channel, then positions, sines and cosines
    assert config.cross_qk_dim == config.cross_v_dim == config.data_width
    assert config.self_qk_dim == config.self_v_dim == config.latent_dim
    assert TINY["conv"].data_width == 8 + 4
    assert (TINY["published"].grid, TINY["published"].data_width) == ((8, 8), 12)


@pytest.mark.parametrize(
    ("changes", "cross_attends", "transformers"),
    [
        ({}, (0, 1, 1), (0, 0, 0)),
        ({"share_first_cross_attention": True}, (0, 0, 0), (0, 0, 0)),
        ({"share_first_latent_transformer": False}, (0, 1, 1), (0, 1, 1)),
        ({"share_weights": False}, (0, 1, 2), (0, 1, 2)),
        ({"num_iterations": 1}, (0,), (0,)),
    ],
)
def test_sharing(changes: dict[str, Any], cross_attends: tuple[int, ...], transformers: tuple[int, ...]) -> None:
    config = replace(BASE, **{"num_iterations": 3, **changes})
    assert config.cross_attend_order == cross_attends
    assert config.latent_transformer_order == transformers


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_survives_json(config: PerceiverConfig) -> None:
    config = replace(config, pixel_mean=(0.5,) * config.image_shape[2])
    assert PerceiverConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_settings_import_no_keras() -> None:
    code = "import sys, perceiver.cost, perceiver.presets; sys.exit('keras' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
