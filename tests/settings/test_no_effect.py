"""An option that does nothing beside the others is named, and one that does something is not."""

from copy import copy
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from command_lines import config_of
from tiny_perceivers import TINY

from perceiver.model import Perceiver
from pipeline.settings.no_effect import RULES
from pipeline.settings.presets import cifar100, quickstart

NO_EFFECT = [
    (
        "--train.warmup-epochs 5 --train.learning-rate-schedule constant",
        "train.warmup_epochs = 5.0 does nothing with train.learning_rate_schedule = constant: leave it out, or give "
        "--train.learning-rate-schedule cosine",
    ),
    ("keras_example --train.warmup-epochs=5", "train.warmup_epochs = 5.0 does nothing"),
    ("--train.plateau-patience 5", "train.plateau_patience = 5 does nothing with train.learning_rate_schedule"),
    ("--train.optimizer sgd --train.muon_steps 4", "train.muon_steps = 4 does nothing with train.optimizer = sgd"),
    ("quickstart --train.alternating-flip", "train.alternating_flip = True does nothing with train.random_flip"),
    (
        "quickstart --train.cutmix-until 0.5",
        "train.cutmix_until = 0.5 does nothing with train.cutmix = 0.0: leave it out, or give --train.cutmix a share",
    ),
    ("--train.cutmix-until 0 --train.cutmix 0.5", "train.cutmix = 0.5 does nothing with train.cutmix_until = 0.0"),
    (
        "--train.num-workers 1 --train.gradient-dtype bfloat16",
        "train.gradient_dtype = bfloat16 does nothing with train.num_workers = 1",
    ),
    ("--train.cache-gb 4", "train.cache_gb = 4.0 does nothing with train.cache = None"),
    ("--data.test-fraction 0.3", "data.test_fraction = 0.3 does nothing with data.source = cifar100: leave it out"),
    ("--model.patch-size 2", "model.patch_size = 2 does nothing with model.stem = conv"),
    (
        "cifar100_pixels --model.conv-channels 32 --model.conv-pool-size 2",
        "model.conv_channels = 32 and model.conv_pool_size = 2 do nothing with model.stem = patches: leave them out",
    ),
    ("quickstart --model.conv-channels 32", "model.conv_channels = 32 does nothing with model.num_conv_layers = 1 and"),
    ("--model.conv-channel-growth 2", "model.conv_channel_growth = 2 does nothing with model.num_conv_layers = 2"),
    (
        "--model.position-encoding none --model.position-combination concat",
        "model.position_combination = concat does nothing with model.position_encoding = none",
    ),
    ("--model.num-fourier-bands 8", "model.num_fourier_bands = 8 does nothing with model.position_encoding = learned"),
    (
        "--model.position-encoding fourier --model.num-fourier-bands 1 --model.fourier-max-resolution 9",
        "model.fourier_max_resolution = 9 does nothing with model.num_fourier_bands = 1",
    ),
    ("--model.learned-position-dim 8", "model.learned_position_dim = 8 does nothing with model.position_encoding"),
    (
        "--model.share-first-cross-attention",
        "model.share_first_cross_attention = True does nothing with model.share_weights = False",
    ),
    (
        "--model.num-iterations 1 --model.no-share-weights",
        "model.share_weights = False does nothing with model.num_iterations = 1",
    ),
    (
        "--model.dropout-after-attention",
        "model.dropout_after_attention = True does nothing with model.dropout = 0.0",
    ),
    ("--model.seed 3", "model.seed = 3 does nothing with model.dropout = 0.0 and"),
    (
        "--search.epochs 3 --search.train-rows 100",
        "search.epochs = 3 and search.train_rows = 100 do nothing with search.num_trials = 0: leave them out, or give "
        "--search.num-trials",
    ),
    (
        "quickstart --search.algorithm random --search.num-startup-trials 3",
        "search.num_startup_trials = 3 does nothing with search.algorithm = random",
    ),
    ("quickstart --search.grid-points 4", "search.grid_points = 4 does nothing with search.algorithm = tpe"),
    (
        "quickstart --search.algorithm grid --search.grid-points 4 --search.learning-rate --search.weight-decay 0.1",
        "search.grid_points = 4 does nothing with search.learning_rate = none and search.weight_decay = 0.1",
    ),
    (
        "quickstart --search.no-early-stopping --search.grace-epochs 2",
        "search.grace_epochs = 2 does nothing with search.early_stopping = False",
    ),
    (
        "quickstart --search.workers-per-trial 2 --search.memory-limit-gib 4",
        "search.memory_limit_gib = 4.0 does nothing with search.workers_per_trial = 2",
    ),
    (
        "--evaluation.corruption-rows 0 --evaluation.seed 1 --evaluation.corruption-severities 1 2",
        "evaluation.corruption_severities = 1 2 and evaluation.seed = 1 do nothing with evaluation.corruption_rows = 0",
    ),
]


@pytest.mark.parametrize(("argv", "said"), NO_EFFECT)
def test_an_option_without_effect_is_named(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(*argv.split())
    assert f"warning: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        "--train.learning-rate-schedule constant --train.warmup-epochs 0",
        "--train.learning-rate-schedule plateau --train.plateau-patience 5",
        "quickstart --train.no-alternating-flip --train.cutmix-until 1",
        "--train.num-workers 1:2 --train.gradient-dtype bfloat16",
        "quickstart --search.workers-per-trial 2 --train.num-workers 1 --train.gradient-dtype bfloat16",
        "--train.cache /tmp/shards --train.cache-gb 4",
        "quickstart --data.test-fraction 0.3",
        "cifar100_pixels --model.patch-size 2 --model.num-conv-residuals 0",
        "--model.num-conv-layers 1 --model.data-dim None --model.conv-channels 32",
        "--model.position-encoding fourier --model.no-include-positions --model.num-fourier-bands 8",
        "--model.position-combination concat --model.learned-position-dim 8",
        "quickstart --model.no-share-first-latent-transformer",
        "quickstart --model.num-iterations 1 --search.num-trials 0",
        "--search.num-trials 0 --search.epochs 3",
        "quickstart --search.algorithm grid --search.grid-points 4",
        "--model.dropout 0.1 --model.seed 3 --model.no-dropout-after-attention",
    ],
)
def test_nothing_is_said_of_one_with_an_effect_or_of_what_happens_anyway(
    argv: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(*argv.split())
    assert not capsys.readouterr().err


def test_a_searched_number_of_iterations_counts(capsys: pytest.CaptureFixture[str]) -> None:
    config_of("quickstart", "--model.no-share-weights", "--search.num-iterations", "1", "2")
    assert not capsys.readouterr().err


def test_nothing_is_said_of_what_a_preset_or_the_source_leaves_without_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of("cifar100", "--data.source", "digits")
    assert not capsys.readouterr().err
    assert config.train.alternating_flip
    assert not config.train.random_flip


def test_the_split_of_own_images_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.repeat([0, 1], 20)
    for split in ("train", "val"):
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((40, 8, 8, 1), "uint8"), labels=labels)
    argv = ["quickstart", "--data.source", "files", "--data.path", str(tmp_path), "--train.global-batch-size", "8"]
    argv += ["--storage", str(tmp_path / "runs")]
    config_of(*argv, "--data.test-fraction", "0.3")
    assert "does nothing" not in capsys.readouterr().err
    for option in ("--data.validation-fraction=0.3", "--data.resize=pad"):
        config_of(*argv, option)
        assert "does nothing with data." in capsys.readouterr().err


def test_every_rule_names_settings_that_exist() -> None:
    config = quickstart()
    known = {
        f"{s.name}.{f.name}" for s in fields(config) if s.name != "storage" for f in fields(getattr(config, s.name))
    }
    for rule in RULES:
        assert {*rule.names, *rule.because, *rule.harmless} <= known
        assert rule.harmless.keys() <= set(rule.names)


UNREAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stem": "pixels"}, {"patch_size": 4}),
    ({"stem": "patches"}, {"num_conv_layers": 3, "conv_channels": 5, "conv_channel_growth": 2, "conv_pool_size": 3}),
    ({"stem": "patches"}, {"num_conv_residuals": 1}),
    ({"stem": "conv", "num_conv_layers": 1, "data_dim": 8}, {"conv_channels": 5}),
    ({"stem": "conv", "num_conv_layers": 2}, {"conv_channel_growth": 2}),
    ({"position_encoding": "none"}, {"position_combination": "concat"}),
    (
        {"position_encoding": "learned"},
        {"num_fourier_bands": 3, "fourier_max_resolution": 5, "include_positions": False},
    ),
    ({"position_encoding": "fourier", "num_fourier_bands": 1}, {"fourier_max_resolution": 5}),
    ({"position_encoding": "learned", "position_combination": "add"}, {"learned_position_dim": 5}),
    ({"position_encoding": "fourier", "position_combination": "concat"}, {"learned_position_dim": 5}),
    (
        {"share_weights": False, "num_iterations": 2},
        {"share_first_cross_attention": True, "share_first_latent_transformer": False},
    ),
    (
        {"num_iterations": 1, "share_weights": True},
        {"share_weights": False, "share_first_cross_attention": True, "share_first_latent_transformer": False},
    ),
    ({"dropout": 0.0}, {"dropout_after_attention": False}),
    ({"dropout": 0.0, "attention_dropout": 0.0, "logits_dropout": 0.0}, {"seed": 5}),
]


@pytest.mark.parametrize(("case", "unread"), UNREAD)
def test_the_model_reads_none_of_them(case: dict[str, Any], unread: dict[str, Any]) -> None:
    """What the rules say of the model is true: the same seed gives the same logits."""
    config = replace(TINY["patches"], **case)
    other = replace(config, **unread)
    of_run = copy(cifar100())
    object.__setattr__(of_run, "model", config)  # whose images are not those of the source
    unread_by_rules = {name for rule in RULES if rule.applies(of_run) for name in rule.names}
    assert {f"model.{name}" for name in unread} <= unread_by_rules
    assert all(getattr(other, name) != getattr(config, name) for name in unread)
    images = np.random.default_rng(0).integers(0, 256, (2, *config.image_shape)).astype("uint8")
    logits = []
    for each in (config, other):
        keras.utils.set_random_seed(0)
        logits.append(np.array(Perceiver(**asdict(each))(images, training=True)))
    np.testing.assert_array_equal(logits[0], logits[1])
