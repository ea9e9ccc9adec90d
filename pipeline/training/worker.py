"""One of the processes that train a model together, as `fit` sees it. Imports no TensorFlow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """A stop was requested; a checkpoint has been reported."""


class NotFinite(Exception):
    """The loss became NaN or infinite."""


def val_score(metrics: Mapping[str, float]) -> float:
    """The validation loss of an epoch as a score, lower is better: one that is not finite is the worst."""
    loss = metrics["val_loss"]
    return loss if math.isfinite(loss) else math.inf


class InitialModelError(Exception):
    """The initial weights do not fit the model."""


class OwnModelError(Exception):
    """A model of one's own cannot be trained as it is."""


@dataclass(frozen=True)
class WorkersStarted:
    """All workers run; they look for each other next.

    Attributes:
        addresses: `host:port` of each.
        open_ports: A warning if strangers can connect to these ports; else empty.
        precision: A warning if the devices are slow at the precision of the training; else empty.
    """

    addresses: tuple[str, ...]
    open_ports: str = ""
    precision: str = ""


@dataclass(frozen=True)
class StepProgress:
    """The position within an epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Steps that are over in this epoch.
        steps: Steps of a whole epoch.
        images_per_second: Of all workers together, in this epoch so far.
        loss: Mean over the epoch so far.
        accuracy: Mean over the epoch so far.
    """

    epoch: int
    step: int
    steps: int
    images_per_second: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class EpochEnded:
    """The end of an epoch.

    Attributes:
        metrics: Metrics of the epoch; `fit` lists them.
    """

    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Worker:
    """One of the processes that train a model together.

    Attributes:
        report: Called with metrics and, at rank 0, with the folder of a checkpoint, which it must have copied when it
            returns. All workers call it equally often. The metrics are those of an epoch that has ended; within an
            epoch they are the position alone: `epoch` (epochs that are over) and `step`.
        rank: Number of this worker, from 0.
        num_workers: Number of workers.
        resume_from: Folder of the checkpoint from which the training continues; None: it starts.
        initial_model: `.keras` file with the initial weights of a training that starts; None: random weights.
        on_stop: Called once with a function that ends the training with a checkpoint and may be called from any thread.
        on_step: Called at rank 0, at most once a second; must not block.
        keep_model: Whether the last checkpoint holds the model too; a trial does not need it.
    """

    report: Callable[[dict[str, Any], Path | None], None]
    rank: int = 0
    num_workers: int = 1
    resume_from: Path | None = None
    initial_model: Path | None = None
    on_stop: Callable[[Callable[[], None]], None] = lambda request: None
    on_step: Callable[[StepProgress], None] = lambda step: None
    keep_model: bool = True
