"""Settings of the hyperparameter search; imports no Ray."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SearchConfig:
    """What the search tries, and how much of it.

    Raises:
        ValueError: if a value is out of range; the message names it and the remedy.
    """

    num_trials: int = 8
    """Number of trials; 0 trains the settings as they are."""
    epochs: int = 4
    """Epochs of a trial that is not stopped early."""
    grace_epochs: int = 1
    """Epochs before ASHA may stop a trial."""
    reduction_factor: int = 3
    """ASHA keeps about one in this many trials at each rung."""
    num_latents: tuple[int, ...] = (16, 32, 64)
    """Numbers of latents to choose from."""
    num_self_attention_heads: tuple[int, ...] = (2, 4, 8)
    """Numbers of self-attention heads to choose from."""
    num_iterations: tuple[int, ...] = (1, 2, 3)
    """Numbers of iterations (cross-attends) to choose from."""
    learning_rate: tuple[float, float] = (5e-4, 5e-3)
    """Lowest and highest learning rate, sampled on a log scale."""
    seed: int = 0
    """Seed of the sampler."""
    cpus_per_trial: float = field(default=1.0, metadata={"keyed": False})
    """CPUs of a trial; it trains in one process, and as many trials run at once as the cluster has CPUs for."""

    def __post_init__(self) -> None:
        for name, least in (("num_trials", 0), ("epochs", 1), ("grace_epochs", 1), ("reduction_factor", 2)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"search.{name} = {value}: give at least {least}")
        for name in ("num_latents", "num_self_attention_heads", "num_iterations"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"search.{name} = {values}: give one or more positive numbers")
        low, high = self.learning_rate
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError(f"search.learning_rate = {low} {high}: give the lowest and the highest, both positive")
        if not 0.001 <= self.cpus_per_trial < math.inf:
            raise ValueError(f"search.cpus_per_trial = {self.cpus_per_trial}: give at least 0.001")
        if self.grace_epochs > self.epochs:
            raise ValueError(
                f"search.grace_epochs = {self.grace_epochs} is more than search.epochs = {self.epochs}: lower it"
            )
        dimensions = (self.num_latents, self.num_self_attention_heads, self.num_iterations, self.learning_rate)
        if self.num_trials and all(len(set(values)) == 1 for values in dimensions):
            raise ValueError(
                f"search.num_trials = {self.num_trials}, but every searched field has one value: give "
                "--search.num-trials 0, or a choice of values for one"
            )
