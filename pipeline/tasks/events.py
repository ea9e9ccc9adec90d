"""What tasks report to the driver while they run. Imports no Ray: the driver's display knows these classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.training.checkpoint_store import CheckpointsDamaged

# The workers report it, which know no tasks; the display, which knows no checkpoints, takes it from here.
__all__ = ["CheckpointsDamaged", "Said", "TrialChanged", "Warned"]


@dataclass(frozen=True)
class Said:
    """A line for the person who waits.

    Attributes:
        task: Name of the task.
        text: The line.
    """

    task: str
    text: str


@dataclass(frozen=True)
class Warned:
    """A warning, which is shown once, since the processes of several trials may give the same.

    Attributes:
        task: Name of the task.
        text: What the person who waits should know, on one line.
    """

    task: str
    text: str


@dataclass(frozen=True)
class TrialChanged:
    """The state of a trial after it has started, ended an epoch or ended.

    Attributes:
        trial: Name of the trial.
        values: Value of every searched dimension.
        gflops: GFLOPs an image of the forward pass.
        status: `running`, `finished`, `stopped early` or `failed`.
        epochs: Number of epochs that are over.
        best_value: Highest validation accuracy so far; None before the first epoch is over.
        error: What went wrong, on one line; None if nothing did.
        seconds_left: Estimated time until the search ends; None if it cannot be estimated yet.
        metrics: Metrics of the epoch that has just ended; None if no epoch has.
    """

    trial: str
    values: Mapping[str, Any]
    gflops: float
    status: str
    epochs: int
    best_value: float | None
    error: str | None
    seconds_left: float | None
    metrics: Mapping[str, float] | None
