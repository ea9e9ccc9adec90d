"""Options that do nothing beside the other settings, of which a person is told before anything starts.

Many of them are part of a task's key, so that a person who gives one gets a training of hours that differs from another
one in its key alone. They are not refused, because a run that was begun with one goes on only with the same key. Only
what was given on the command line is looked at: presets and `with_source` leave settings as they are that nothing
reads.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.data.sources import source_of
from pipeline.settings.config import PipelineConfig
from tune.config import RANGES, SearchConfig

Condition = Callable[[PipelineConfig], bool]


@dataclass(frozen=True)
class Rule:
    """Settings that nothing reads in a certain case."""

    names: tuple[str, ...]
    """The settings, as `section.name`."""
    applies: Condition
    """Whether nothing reads them."""
    because: tuple[str, ...]
    """The settings that decide it; a message quotes their values."""
    remedy: str
    """What to give for the settings to count, in a message that says to leave them out otherwise."""
    harmless: Mapping[str, Any] = field(default_factory=dict)
    """For some of the settings a value that asks for what happens anyway, of which nothing is said."""


def _most_iterations(config: PipelineConfig) -> int:
    return max((config.search.num_trials and config.search.num_iterations) or (config.model.num_iterations,))


def _trains_on_one_worker(config: PipelineConfig) -> bool:
    return config.train.max_workers == 1 and (not config.search.num_trials or config.search.workers_per_trial == 1)


def _searches(config: PipelineConfig) -> bool:
    return config.search.num_trials > 0


def _has_no_range(config: PipelineConfig) -> bool:
    return all(len(set(getattr(config.search, name))) < 2 for name in RANGES)


_SEARCHED = tuple(f"search.{f.name}" for f in fields(SearchConfig) if f.name != "num_trials")
_SHARED_FIRST = ("model.share_first_cross_attention", "model.share_first_latent_transformer")
_CONV = ("num_conv_layers", "conv_channels", "conv_channel_growth", "conv_pool_size", "num_conv_residuals")

RULES = (
    Rule(
        ("train.warmup_epochs",),
        lambda c: c.train.learning_rate_schedule != "cosine",
        ("train.learning_rate_schedule",),
        "give --train.learning-rate-schedule cosine",
        {"train.warmup_epochs": 0},
    ),
    Rule(
        ("train.plateau_patience",),
        lambda c: c.train.learning_rate_schedule != "plateau",
        ("train.learning_rate_schedule",),
        "give --train.learning-rate-schedule plateau",
    ),
    Rule(
        ("train.muon_steps",),
        lambda c: c.train.optimizer != "muon",
        ("train.optimizer",),
        "give --train.optimizer muon",
    ),
    Rule(
        ("train.alternating_flip",),
        lambda c: not c.train.random_flip,
        ("train.random_flip",),
        "give --train.random-flip",
        {"train.alternating_flip": False},
    ),
    Rule(
        ("train.cutmix_until",),
        lambda c: not c.train.cutmix,
        ("train.cutmix",),
        "give --train.cutmix a share above 0",
        {"train.cutmix_until": 1},
    ),
    Rule(
        ("train.cutmix",),
        lambda c: not c.train.cutmix_until,
        ("train.cutmix_until",),
        "give --train.cutmix-until a share above 0",
        {"train.cutmix": 0},
    ),
    Rule(
        ("train.gradient_dtype",),
        _trains_on_one_worker,
        ("train.num_workers",),
        "give more workers, which send gradients to each other",
        {"train.gradient_dtype": "float32"},
    ),
    Rule(("train.cache_gb",), lambda c: c.train.cache is None, ("train.cache",), "give --train.cache a folder"),
    Rule(
        ("data.test_fraction",),
        lambda c: source_of(c.data).test_rows > 0,
        ("data.source",),
        "take images without a test split of their own",
    ),
    Rule(
        ("data.validation_fraction",),
        lambda c: source_of(c.data).validation_rows > 0,
        ("data.source",),
        "take images without a validation split of their own",
    ),
    Rule(
        ("data.resize",),
        lambda c: c.data.source == "files" and c.data.image_size is None,
        ("data.image_size",),
        "give --data.image-size",
    ),
    Rule(("model.patch_size",), lambda c: c.model.stem != "patches", ("model.stem",), "give --model.stem patches"),
    Rule(
        tuple(f"model.{name}" for name in _CONV),
        lambda c: c.model.stem != "conv",
        ("model.stem",),
        "give --model.stem conv",
        {"model.num_conv_residuals": 0, "model.conv_channel_growth": 1},
    ),
    Rule(
        ("model.conv_channels",),
        lambda c: c.model.stem == "conv" and c.model.num_conv_layers == 1 and c.model.data_dim is not None,
        ("model.num_conv_layers", "model.data_dim"),
        "set the channels of the only convolution by --model.data-dim",
    ),
    Rule(
        ("model.conv_channel_growth",),
        lambda c: c.model.stem == "conv" and c.model.num_conv_layers < 3,
        ("model.num_conv_layers",),
        "give --model.num-conv-layers 3 or more",
        {"model.conv_channel_growth": 1},
    ),
    Rule(
        ("model.position_combination",),
        lambda c: c.model.position_encoding == "none",
        ("model.position_encoding",),
        "give --model.position-encoding learned or fourier",
    ),
    Rule(
        ("model.num_fourier_bands", "model.fourier_max_resolution", "model.include_positions"),
        lambda c: c.model.position_encoding != "fourier",
        ("model.position_encoding",),
        "give --model.position-encoding fourier",
        {"model.fourier_max_resolution": None, "model.include_positions": False},
    ),
    Rule(
        ("model.fourier_max_resolution",),
        lambda c: c.model.position_encoding == "fourier" and c.model.num_fourier_bands == 1,
        ("model.num_fourier_bands",),
        "give --model.num-fourier-bands 2 or more",
        {"model.fourier_max_resolution": None},
    ),
    Rule(
        ("model.learned_position_dim",),
        lambda c: c.model.position_encoding != "learned" or c.model.position_combination != "concat",
        ("model.position_encoding", "model.position_combination"),
        "give --model.position-encoding learned --model.position-combination concat",
        {"model.learned_position_dim": None},
    ),
    Rule(
        _SHARED_FIRST,
        lambda c: not c.model.share_weights and _most_iterations(c) > 1,
        ("model.share_weights",),
        "give --model.share-weights",
        dict.fromkeys(_SHARED_FIRST, False),
    ),
    Rule(
        ("model.share_weights", *_SHARED_FIRST),
        lambda c: _most_iterations(c) == 1,
        ("model.num_iterations",),
        "give --model.num-iterations 2 or more",
    ),
    Rule(
        ("model.dropout_after_attention",),
        lambda c: not c.model.dropout,
        ("model.dropout",),
        "give --model.dropout a rate above 0",
        {"model.dropout_after_attention": False},
    ),
    Rule(
        ("model.seed",),
        lambda c: not (c.model.dropout or c.model.attention_dropout or c.model.logits_dropout),
        ("model.dropout", "model.attention_dropout", "model.logits_dropout"),
        "give --train.seed, which the initial weights and the order of rows follow",
        {"model.seed": None},
    ),
    Rule(_SEARCHED, lambda c: not _searches(c), ("search.num_trials",), "give --search.num-trials"),
    Rule(
        ("search.num_startup_trials",),
        lambda c: _searches(c) and c.search.algorithm != "tpe",
        ("search.algorithm",),
        "give --search.algorithm tpe",
    ),
    Rule(
        ("search.grid_points",),
        lambda c: _searches(c) and c.search.algorithm != "grid",
        ("search.algorithm",),
        "give --search.algorithm grid",
    ),
    Rule(
        ("search.grid_points",),
        lambda c: _searches(c) and c.search.algorithm == "grid" and _has_no_range(c),
        tuple(f"search.{name}" for name in RANGES),
        "give one of these a lowest and a highest value",
    ),
    Rule(
        ("search.grace_epochs", "search.reduction_factor"),
        lambda c: _searches(c) and not c.search.early_stopping,
        ("search.early_stopping",),
        "give --search.early-stopping",
    ),
    Rule(
        ("search.memory_limit_gib",),
        lambda c: _searches(c) and c.search.workers_per_trial > 1,
        ("search.workers_per_trial",),
        "give --search.workers-per-trial 1, whose process it limits",
        {"search.memory_limit_gib": None},
    ),
    Rule(
        ("evaluation.corruption_severities", "evaluation.seed"),
        lambda c: not c.evaluation.corruption_rows,
        ("evaluation.corruption_rows",),
        "give --evaluation.corruption-rows a number above 0",
    ),
)


def without_effect(config: PipelineConfig, given: Collection[str]) -> list[str]:
    """A line for each of the rules by which given options do nothing.

    Args:
        config: The settings, in which the given ones are included.
        given: Names of the options on the command line, as `section.name` or, of a switch that is turned off,
            `section.no_name`.

    Returns:
        Lines with the options, the settings that decide it, and the remedy.
    """
    found = []
    for rule in RULES:
        # Whoever adds `--search.num-trials 0` to a command knows that its other options of the search do nothing.
        if rule.names is _SEARCHED and "search.num_trials" in given:
            continue
        useless = [name for name in rule.names if _is_given(name, given) and not _is_harmless(config, name, rule)]
        if useless and rule.applies(config):
            them, do = ("it", "does") if len(useless) == 1 else ("them", "do")
            found.append(
                f"{_quoted(config, useless)} {do} nothing with {_quoted(config, rule.because)}: leave {them} out, or "
                f"{rule.remedy}"
            )
    return found


def _is_given(name: str, given: Collection[str]) -> bool:
    return name in given or name.replace(".", ".no_", 1) in given


def _is_harmless(config: PipelineConfig, name: str, rule: Rule) -> bool:
    return name in rule.harmless and _value(config, name) == rule.harmless[name]


def _quoted(config: PipelineConfig, names: Collection[str]) -> str:
    return " and ".join(f"{name} = {_text(_value(config, name))}" for name in names)


def _value(config: PipelineConfig, name: str) -> Any:
    section, _, setting = name.partition(".")
    return getattr(getattr(config, section), setting)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
