"""The search space, and how a sample of it becomes a model's settings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import ray.tune

from perceiver.config import PerceiverConfig
from tune.config import SearchConfig

# Field of PerceiverConfig -> field of SearchConfig of the same name; the learning rate is no part of the model.
MODEL_DIMENSIONS = ("num_latents", "num_self_attention_heads", "num_iterations")
LEARNING_RATE = "learning_rate"

Config = TypeVar("Config", bound=PerceiverConfig)


def fixed_values(settings: SearchConfig) -> dict[str, Any]:
    """The dimensions in which there is nothing to choose, with their values."""
    fixed = {name: getattr(settings, name)[0] for name in MODEL_DIMENSIONS if len(set(getattr(settings, name))) == 1}
    low, high = settings.learning_rate
    return fixed | ({LEARNING_RATE: low} if low == high else {})


def param_space(settings: SearchConfig) -> dict[str, Any]:
    """Ray Tune's search space: every dimension in which there is something to choose."""
    fixed = fixed_values(settings)
    space = {
        name: ray.tune.choice(sorted(set(getattr(settings, name)))) for name in MODEL_DIMENSIONS if name not in fixed
    }
    if LEARNING_RATE not in fixed:
        space[LEARNING_RATE] = ray.tune.loguniform(*settings.learning_rate)
    return space


def to_model(sample: Mapping[str, Any], base: Config) -> Config:
    """`base` with the sampled fields."""
    return replace(base, **{name: sample[name] for name in MODEL_DIMENSIONS if name in sample})
