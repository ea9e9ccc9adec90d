"""The settings of a run: which of them are keyed, how they fit together, and their flat form."""

import json
from dataclasses import asdict, fields
from typing import Any

import pytest
from command_lines import config_of

from perceiver.config import PerceiverConfig
from pipeline.fields import keyed
from pipeline.settings.config import ModelConfig, PipelineConfig, flatten
from pipeline.settings.presets import cifar100, quickstart, with_source
from tune.config import SearchConfig
from tune.space import DIMENSIONS


def test_what_says_how_a_run_is_carried_out_is_not_keyed() -> None:
    config = cifar100()
    execution_of_training = {"num_workers", "cpus_per_worker", "use_gpu", "max_failures", "deterministic"}
    execution_of_training |= {"checkpoint_every_steps", "checkpoints_kept"}
    sections: list[tuple[Any, set[str]]] = [
        (config.data, {"archive"}),
        (config.search, {"workers_per_trial", "cpus_per_trial", "max_concurrent_trials", "memory_limit_gib"}),
        (config.train, execution_of_training),
        (config.model, set()),
    ]
    for section, execution in sections:
        assert {f.name for f in fields(section)} - set(keyed(section)) == execution
        assert all(value == getattr(section, name) for name, value in keyed(section).items())


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
    assert with_source(cifar100(), "cifar10").model.num_classes == 10
    with pytest.raises(ValueError, match="every searched field has one value"):
        SearchConfig(**{d.name: (8, 8) for d in DIMENSIONS})  # type: ignore[arg-type]
