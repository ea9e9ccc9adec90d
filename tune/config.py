"""Settings of the hyperparameter search. Imports no Ray, so that the command line starts fast."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

# Metadata of fields that change how a search is executed but not its result; they are not part of a task's key.
EXECUTION: dict[str, Any] = {"keyed": False}
CHOICES = (
    "num_latents",
    "latent_dim",
    "num_self_attention_heads",
    "num_iterations",
    "num_self_attention_blocks",
)
RANGES = ("learning_rate", "weight_decay")


@dataclass(frozen=True)
class SearchConfig:
    """What the search tries, and how many trials it runs.

    A dimension with several values is searched, one with a single value is fixed to it, and one without values keeps
    the value of the model's or the training's settings.

    Raises:
        ValueError: if a value is out of range; the message names the value and the remedy.
    """

    num_trials: int = 8
    """Number of trials; 0 skips the search and trains with the settings as they are."""
    epochs: int = 4
    """Epochs of a trial that is not stopped early."""
    train_rows: int = 0
    """Number of training rows of a trial, a sample stratified by class; 0: all rows."""
    validation_rows: int = 0
    """Number of validation rows of a trial, a sample stratified by class; 0: all rows."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How points are chosen: Optuna's TPE, random sampling, or all points of a grid in random order."""
    num_startup_trials: int = 8
    """Number of random trials before TPE takes over; 4 and 8 did best in benchmarks/search_replay.py."""
    grid_points: int = 3
    """Number of values each of learning rate and weight decay on a grid."""
    objective: Literal["accuracy", "accuracy_at_cost"] = "accuracy"
    """What is maximized: validation accuracy, over all models or only over those of at most `cost_limit_gflops`."""
    cost_limit_gflops: float | None = None
    """Limit of `accuracy_at_cost` in GFLOPs per image; more expensive models may be tried but are never the best."""
    max_gflops: float | None = None
    """Budget in GFLOPs per image (forward pass); more expensive models are not tried."""
    max_parameters: int | None = None
    """Budget in parameters; larger models are not tried."""
    early_stopping: bool = True
    """Whether ASHA stops trials that fall behind the others."""
    grace_epochs: int = 1
    """Epochs before ASHA may stop a trial; it never does in the warm-up of the learning rate."""
    reduction_factor: int = 3
    """ASHA continues about one in this many trials at each rung."""
    num_latents: tuple[int, ...] = (16, 32, 64)
    """Numbers of latents to choose from."""
    latent_dim: tuple[int, ...] = (64, 128, 192)
    """Widths of a latent to choose from; a width is tried only with numbers of heads that divide it."""
    num_self_attention_heads: tuple[int, ...] = (2, 4, 8)
    """Numbers of self-attention heads to choose from."""
    num_iterations: tuple[int, ...] = (1, 2, 3)
    """Numbers of iterations (cross-attends) to choose from."""
    num_self_attention_blocks: tuple[int, ...] = (1, 2, 3)
    """Numbers of self-attention blocks per cross-attend to choose from."""
    learning_rate: tuple[float, ...] = (5e-4, 5e-3)
    """Lowest and highest learning rate, sampled on a log scale."""
    weight_decay: tuple[float, ...] = (0.01, 0.2)
    """Lowest and highest weight decay, sampled on a log scale."""
    use_earlier_trials: bool = True
    """Whether to use trials of earlier searches with the same data, recipe and number of epochs."""
    seed: int = 0
    """Seed of the sampler."""
    workers_per_trial: int = field(default=1, metadata=EXECUTION)
    """Number of data-parallel workers of a trial. A single worker keeps its process for the next trial."""
    cpus_per_trial: float = field(default=1.0, metadata=EXECUTION)
    """CPUs of each worker of a trial; as many trials run at once as the cluster has CPUs for."""
    max_concurrent_trials: int = field(default=0, metadata=EXECUTION)
    """Most trials that run at the same time; 0: as many as the cluster has resources for."""
    memory_limit_gib: float | None = field(default=None, metadata=EXECUTION)
    """Memory limit of a trial's process in GiB; a trial that exceeds it fails. None: no limit."""

    def __post_init__(self) -> None:
        least = {"num_trials": 0, "epochs": 1, "num_startup_trials": 1, "grid_points": 1, "grace_epochs": 1}
        least |= {"reduction_factor": 2, "workers_per_trial": 1, "max_concurrent_trials": 0}
        least |= {"train_rows": 0, "validation_rows": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"search.{name} = {getattr(self, name)}: give at least {lowest}")
        for name in CHOICES:
            values = getattr(self, name)
            if values and min(values) < 1:
                raise ValueError(f"search.{name} = {values}: give positive numbers, or none to leave it unsearched")
        for name in RANGES:
            self._check_range(name)
        if not 0.001 <= self.cpus_per_trial < math.inf:
            raise ValueError(f"search.cpus_per_trial = {self.cpus_per_trial}: give at least 0.001")
        for name in ("cost_limit_gflops", "max_gflops", "max_parameters", "memory_limit_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"search.{name} = {value}: give a positive number")
        if (self.objective == "accuracy_at_cost") != (self.cost_limit_gflops is not None):
            raise ValueError(
                f"search.objective = {self.objective} with search.cost_limit_gflops = {self.cost_limit_gflops}: "
                "accuracy_at_cost needs the limit, and accuracy has none (search.max_gflops keeps models out)"
            )
        if self.grace_epochs > self.epochs:
            raise ValueError(
                f"search.grace_epochs = {self.grace_epochs} is more than search.epochs = {self.epochs}: lower it"
            )
        if self.workers_per_trial > 1 and (self.train_rows or self.validation_rows):
            raise ValueError(
                f"search.workers_per_trial = {self.workers_per_trial} with search.train_rows = {self.train_rows} and "
                f"search.validation_rows = {self.validation_rows}: trials on several workers see all; give one worker"
            )
        dimensions = [getattr(self, name) for name in (*CHOICES, *RANGES)]
        if self.num_trials and all(len(set(values)) < 2 for values in dimensions):
            raise ValueError(
                f"search.num_trials = {self.num_trials}, but every searched field has one value: give "
                "--search.num-trials 0, or a choice of values for one"
            )

    def _check_range(self, name: str) -> None:
        values = getattr(self, name)
        if len(values) == 1 and not 0 < values[0] < math.inf:
            remedy = "give a positive number, or none to leave it unsearched"
            if name == "weight_decay" and values[0] == 0:
                remedy = "0 has no place on a log scale; to train without weight decay, give --train.weight-decay 0"
            raise ValueError(f"search.{name} = {values[0]}: {remedy}")
        if len(values) > 2 or any(not 0 < value < math.inf for value in values) or tuple(sorted(values)) != values:
            given = " ".join(map(str, values))
            raise ValueError(
                f"search.{name} = {given}: give the lowest and the highest, both positive, or one value, or none to "
                "leave it unsearched"
            )
