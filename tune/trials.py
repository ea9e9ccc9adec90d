"""What is known of each trial of a search, and where it is kept: a small JSON file each, so that any driver can go on.

Ray Tune's own snapshots come every few seconds and name trials anew where one was missed. Here a trial has a number
for ever, is written down before it starts and when it has ended, and nothing else is needed to go on.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

from perceiver.cost import parameter_count
from tune.config import SearchConfig
from tune.space import Sample, Space, gflops_per_image, to_model

OBJECTIVE = "val_accuracy"
SCORE = "score"
Status = Literal["running", "finished", "stopped early", "failed"]


class Store(Protocol):
    """Where files of JSON are kept; paths are relative, with forward slashes."""

    def exists(self, path: str) -> bool: ...

    def list(self, path: str) -> list[str]: ...

    def read_json(self, path: str) -> Any: ...

    def write_json(self, path: str, value: Any) -> None: ...


@dataclass
class Trial:
    """One trial.

    Attributes:
        name: the same for all drivers that go on with the search, e.g. `trial-0007`.
        values: of every searched dimension.
        gflops: GFLOPs an image, forward.
        parameters: of the model.
        status: `running` until it has ended.
        error: what went wrong, on one line.
        history: metrics of each epoch that is over, its number (from 1) under `epoch`.
        started, ended: seconds since 1970.
    """

    name: str
    values: Sample
    gflops: float
    parameters: int
    status: Status = "running"
    error: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    ended: float | None = None

    @classmethod
    def of(cls, name: str, values: Sample, space: Space) -> "Trial":
        model = to_model(values, space.model)
        return cls(name, values, gflops_per_image(model), parameter_count(model))

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Trial":
        """From its fields; what else is in `row` is left out."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def best_value(self) -> float | None:
        """Highest validation accuracy of an epoch; None if there is none."""
        values = [row[OBJECTIVE] for row in self.history if math.isfinite(row[OBJECTIVE])]
        return max(values, default=None)

    @property
    def epochs(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0

    def note(self, metrics: Mapping[str, Any]) -> bool:
        """Adds the metrics of an epoch; whether it was new, and not told again by a trial that goes on."""
        if metrics["epoch"] <= self.epochs:
            return False
        self.history.append({k: float(v) for k, v in metrics.items() if isinstance(v, int | float)})
        return True

    def end(self, status: Status, error: str | None = None) -> None:
        self.status, self.error, self.ended = status, error, time.time()


def score(value: float, gflops: float, settings: SearchConfig) -> float:
    """What is maximised: the validation accuracy, or, of a model beyond the cost limit, how far it is beyond, negative.

    A model beyond is thus worse than any within, and the worse the further: to TPE, which looks at ranks only, that is
    a constraint that is not met.
    """
    limit = settings.cost_limit_gflops
    return value if limit is None or gflops <= limit else 1 - gflops / limit


def best_of(trials: Iterable[Trial], settings: SearchConfig) -> Trial | None:
    """The trial with the highest value among those that count; None if there is none."""
    limit = settings.cost_limit_gflops or math.inf
    reached = [trial for trial in trials if trial.best_value is not None and trial.gflops <= limit]
    return max(reached, key=lambda trial: (trial.best_value, trial.epochs), default=None)


def seconds_left(trials: Sequence[Trial], num_trials: int, slots: int) -> float | None:
    """How long a search will still take, if the trials to come take as long as those that have ended.

    Args:
        trials: those that were begun.
        num_trials: in all.
        slots: trials at the same time.

    Returns:
        None as long as none has ended.
    """
    now, took = time.time(), [trial.ended - trial.started for trial in trials if trial.ended is not None]
    if not took:
        return None
    mean = sum(took) / len(took)
    running = sum(max(0.0, mean - (now - trial.started)) for trial in trials if trial.ended is None)
    return (running + mean * max(0, num_trials - len(trials))) / slots


class Journal:
    """The trials of a search, and those that it takes over from earlier ones.

        <folder>/trial-0007.json     one of them
        <folder>/earlier.json        what the search has taken over

    Args:
        store: where it is kept.
        folder: of this search.
        others: folders of other searches whose trials can be compared: the same data, recipe and number of epochs.
    """

    def __init__(self, store: Store, folder: str, others: Sequence[str] = ()) -> None:
        self.store, self.folder, self._others = store, folder, others

    def trials(self) -> list[Trial]:
        """Those of this search, in the order in which they were begun."""
        return self._read(self.folder)

    def put(self, trial: Trial) -> None:
        self.store.write_json(f"{self.folder}/{trial.name}.json", asdict(trial))

    def earlier(self, space: Space) -> list[Trial]:
        """Trials that other searches had ended when this one was begun, and that belong to `space`.

        They are written down, so that a search which goes on knows what it knew.
        """
        path = f"{self.folder}/earlier.json"
        if not self.store.exists(path):
            ended = [trial for other in self._others for trial in self._read(other) if trial.status != "running"]
            self.store.write_json(path, [asdict(trial) for trial in ended if space.contains(trial.values)])
        return [Trial.from_dict(row) for row in self.store.read_json(path)]

    def note_death(self, trial: str, error: str) -> None:
        """Leaves word of why a process ends itself."""
        self.store.write_json(self._death(trial), error)

    def death(self, trial: str) -> str | None:
        """Why the process of a trial has ended itself; None if it has not."""
        path = self._death(trial)
        return self.store.read_json(path) if self.store.exists(path) else None

    def _death(self, trial: str) -> str:
        return f"{self.folder}/death-of-{trial}.json"

    def _read(self, folder: str) -> list[Trial]:
        names = [name for name in self.store.list(folder) if name.startswith("trial-") and name.endswith(".json")]
        return [Trial.from_dict(self.store.read_json(f"{folder}/{name}")) for name in names]
