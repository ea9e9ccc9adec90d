"""The settings of a run: which of them are keyed, how they fit together, and their flat form."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from command_lines import config_of

from perceiver.config import PerceiverConfig
from pipeline.data.config import DatasetConfig
from pipeline.data.sources import SOURCES
from pipeline.fields import keyed
from pipeline.settings.config import ModelConfig, PipelineConfig, flatten
from pipeline.settings.presets import PRESETS, cifar100, quickstart, with_source
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run
from tune.config import SearchConfig
from tune.space import DIMENSIONS


def test_what_says_how_a_run_is_carried_out_is_not_keyed() -> None:
    config = cifar100()
    execution_of_training = {"num_workers", "cpus_per_worker", "use_gpu", "max_failures", "deterministic", "reserve"}
    execution_of_training |= {"checkpoint_every_steps", "checkpoints_kept", "cache", "cache_gb"}
    sections: list[tuple[Any, set[str]]] = [
        (config.data, {"archive", "path", "max_corrupt", "found"}),
        (config.search, {"workers_per_trial", "cpus_per_trial", "max_concurrent_trials", "memory_limit_gib"}),
        (config.train, execution_of_training),
        (config.model, set()),
    ]
    for section, execution in sections:
        later = {f.name for f in fields(section) if f.metadata.get("keyed") == "unless default"}
        assert {f.name for f in fields(section)} - set(keyed(section)) - later == execution
        assert all(value == getattr(section, name) for name, value in keyed(section).items())


# Begin of the key of the last task, which depends on all settings, as of 26 November 2026.
KEYS = {
    ("cifar100", "cifar100"): "69d8d32e30cc",
    ("cifar100", "cifar10"): "d5dcd66d543d",
    ("cifar100", "digits"): "f81358d47bc5",
    ("cifar100_pixels", "cifar100"): "ef071ce9fd19",
    ("cifar100_pixels", "cifar10"): "77e608dd15c4",
    ("cifar100_pixels", "digits"): "4d15d2d54a54",
    ("cifar100_gpu", "cifar100"): "45a6449bcb4d",
    ("cifar100_gpu", "cifar10"): "31d50694afa8",
    ("cifar100_gpu", "digits"): "d8e0d6c65c20",
    ("cifar100_8gpu", "cifar100"): "a627b247c214",
    ("cifar100_8gpu", "cifar10"): "48209d4a5194",
    ("cifar100_8gpu", "digits"): "58dc24ab83d4",
    ("keras_example", "cifar100"): "46173c85147b",
    ("keras_example", "cifar10"): "749083fc379c",
    ("keras_example", "digits"): "4c0acf73569b",
    ("quickstart", "cifar100"): "84b1d5f3225d",
    ("quickstart", "cifar10"): "fe8fa28786dc",
    ("quickstart", "digits"): "09c28c7cc66b",
}


@pytest.mark.parametrize(("preset", "source"), KEYS)
def test_runs_of_the_built_in_sources_keep_their_keys(preset: str, source: str) -> None:
    config = PRESETS[preset]()
    config = with_source(config, replace(config.data, source=source))  # type: ignore[arg-type]
    assert Run(TASKS, config, Storage("unused")).keys["report"][:12] == KEYS[preset, source]


def test_what_was_added_later_is_keyed_once_it_is_given() -> None:
    growing = ("--model.num-conv-layers", "3", "--model.conv-channel-growth", "2")
    config = config_of("--train.class-weights", "balanced", *growing)
    assert keyed(config.train)["class_weights"] == "balanced"
    assert keyed(config.model)["conv_channel_growth"] == 2


def test_a_preset_for_larger_images_has_a_longer_stem_and_larger_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(SOURCES["cifar10"], image_shape=(224, 224, 1), num_classes=500)
    monkeypatch.setitem(SOURCES, "cifar10", large)
    config = with_source(cifar100(), DatasetConfig("cifar10"))
    assert (config.model.num_conv_layers, config.model.num_inputs, config.model.num_latents) == (4, 196, 16)
    assert config.train.random_crop_padding == 28


def test_xla_is_keyed_for_it_rounds_otherwise() -> None:
    without, with_xla = config_of().train, config_of("--train.jit-compile").train
    assert (without.jit_compile, with_xla.jit_compile) == (False, True)
    assert keyed(without) != keyed(with_xla)


def test_a_range_of_workers() -> None:
    train = config_of("--train.num-workers", "1:4").train
    assert (train.num_workers, train.min_workers, train.max_workers) == ((1, 4), 1, 4)
    # 128 rows cannot be divided among three workers, so one of them stands by.
    assert [train.usable_workers(available) for available in (1, 2, 3, 4)] == [1, 2, 2, 4]
    train = config_of("--train.num-workers", "3", "--train.global-batch-size", "96").train
    assert (train.num_workers, train.min_workers, train.max_workers, train.usable_workers(3)) == (3, 3, 3, 3)
    assert flatten(config_of("--train.num-workers", "1:4"))["train.num_workers"] == (1, 4)


SECTIONS = [f.name for f in fields(PipelineConfig) if f.name != "storage"]


def test_flatten_has_every_field_once() -> None:
    flat = flatten(quickstart())
    assert flat["train.learning_rate"] == 3e-3
    assert flat["model.image_shape"] == (8, 8, 1)
    assert flat["storage"] == "./runs"
    assert len(flat) == sum(len(asdict(quickstart())[name]) for name in SECTIONS) + 1
    json.dumps(flat)


def test_a_model_section_makes_a_perceiver_config() -> None:
    assert asdict(PerceiverConfig(**asdict(ModelConfig()))) == asdict(ModelConfig())
    with pytest.raises(ValueError, match=r"presets\.with_source"):
        PipelineConfig(model=ModelConfig(image_shape=(8, 8, 1)))
    assert with_source(cifar100(), DatasetConfig("cifar10")).model.num_classes == 10
    with pytest.raises(ValueError, match="every searched field has one value"):
        SearchConfig(**{d.name: (8, 8) for d in DIMENSIONS})  # type: ignore[arg-type]


def test_the_shuffle_window_is_keyed_where_it_is_not_the_default() -> None:
    train = cifar100().train
    assert "shuffle_window_mb" not in keyed(train), "trainings of earlier versions stay done"
    assert keyed(replace(train, shuffle_window_mb=64))["shuffle_window_mb"] == 64
