"""The record of a search: one small JSON file per trial, from which a search that was cut off continues.

Ray Tune's own snapshots are not used: they are written every few seconds, and a trial that a snapshot missed runs again
under another name. Here a trial keeps its number, and its file is written before it starts and when it has ended.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

from perceiver.cost import parameter_count
from tune.config import SearchConfig
from tune.space import Sample, Space, gflops_per_image, to_model, told_apart

OBJECTIVE = "val_accuracy"
SCORE = "score"
# In a result, beside its score: the trial has reported this epoch before it was cut off.
AGAIN = "again"
Status = Literal["running", "finished", "stopped early", "failed"]


class Store(Protocol):
    """Storage of JSON files. Paths are relative and use forward slashes."""

    def exists(self, path: str) -> bool: ...

    def list(self, path: str) -> list[str]: ...

    def read_json(self, path: str) -> Any: ...

    def write_json(self, path: str, value: Any) -> None: ...

    def delete(self, path: str) -> None: ...


@dataclass
class Trial:
    """One trial.

    Attributes:
        name: e.g. `trial-0007`; the same when the search is restarted.
        values: value of every searched dimension, by name.
        gflops: GFLOPs per image, forward pass.
        parameters: number of parameters of the model.
        status: `running` until the trial has ended.
        error: the reason of a failure, on one line.
        history: metrics of each completed epoch, with its number (from 1) as `epoch`.
        started: time of the start, in seconds since 1970.
        ended: time of the end, in seconds since 1970; None while the trial runs.
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
        """The trial with the fields in `row`; other entries of `row` are ignored."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def best_value(self) -> float | None:
        """Highest validation accuracy of any epoch; None if no epoch has a finite one."""
        values = [row[OBJECTIVE] for row in self.history if math.isfinite(row[OBJECTIVE])]
        return max(values, default=None)

    @property
    def epochs(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0

    def add_epoch(self, metrics: Mapping[str, Any]) -> bool:
        """Adds the metrics of an epoch. Returns False if it is known: a resumed trial reports its epochs once more."""
        if metrics["epoch"] <= self.epochs:
            return False
        self.history.append({k: float(v) for k, v in metrics.items() if isinstance(v, int | float)})
        return True

    def end(self, status: Status, error: str | None = None) -> None:
        self.status, self.error, self.ended = status, error, time.time()


def score(value: float, gflops: float, settings: SearchConfig) -> float:
    """The value that the search maximizes: the validation accuracy, or a negative number beyond the cost limit.

    The further a model is beyond the limit, the lower it scores, and always lower than a model within it. TPE compares
    ranks only, so this acts as a constraint.
    """
    limit = settings.cost_limit_gflops
    return value if limit is None or gflops <= limit else 1 - gflops / limit


def best_of(trials: Iterable[Trial], settings: SearchConfig) -> Trial | None:
    """The trial with the highest accuracy within the cost limit; None if no trial has a value.

    A failed trial ranks after all others: its values before the failure say nothing about a training with its settings.
    """
    candidates = [trial for trial in _within_limit(trials, settings) if trial.best_value is not None]
    return max(candidates, key=lambda trial: (trial.status != "failed", trial.best_value, trial.epochs), default=None)


def no_best(trials: Sequence[Trial], settings: SearchConfig) -> str:
    """The reason for which none of the trials is the best, with a remedy or the first error."""
    within, limit = _within_limit(trials, settings), settings.cost_limit_gflops
    if limit is not None and trials and not within:
        low, high = told_apart(limit, min(trial.gflops for trial in trials))
        return (
            f"no trial is within search.cost_limit_gflops = {low}, and the cheapest of the {len(trials)} has {high}: "
            "raise the limit, search smaller models, or give more trials"
        )
    error = next((trial.error for trial in within if trial.error), "none ran")
    where = "" if limit is None else f" within search.cost_limit_gflops = {limit:g}"
    return f"no trial{where} came as far as one epoch; the first one: {error}"


def _within_limit(trials: Iterable[Trial], settings: SearchConfig) -> list[Trial]:
    limit = settings.cost_limit_gflops or math.inf
    return [trial for trial in trials if trial.gflops <= limit]


def seconds_left(trials: Sequence[Trial], num_trials: int, concurrent: int) -> float | None:
    """Estimated remaining time of a search, from the mean duration of the trials that have ended.

    Args:
        trials: the trials that have started.
        num_trials: number of trials of the whole search.
        concurrent: number of trials that run at the same time.

    Returns:
        None until a trial has ended.
    """
    now, durations = time.time(), [trial.ended - trial.started for trial in trials if trial.ended is not None]
    if not durations:
        return None
    mean = sum(durations) / len(durations)
    running = sum(max(0.0, mean - (now - trial.started)) for trial in trials if trial.ended is None)
    return (running + mean * max(0, num_trials - len(trials))) / concurrent


class Journal:
    """The stored trials of a search, and those that it takes over from earlier searches.

        <folder>/trial-0007.json            a trial
        <folder>/earlier.json               the trials taken over
        <folder>/death-of-trial-0007.json   why the process of a trial ended itself
        <folder>/restart.json               there while the trials are made to run again

    Args:
        store: storage of the files.
        folder: folder of this search.
        others: folders of comparable searches: those with the same data, recipe and number of epochs.
        mask: hides secrets in the text of an error, which may quote the login of a storage. Every error of a trial
            passes it before it is stored, reported to Ray Tune, which writes files of its own, or raised.
    """

    def __init__(
        self, store: Store, folder: str, others: Sequence[str] = (), mask: Callable[[str], str] = lambda text: text
    ) -> None:
        self.store, self.folder, self._others, self.mask = store, folder, others, mask

    def trials(self) -> list[Trial]:
        """The trials of this search, in the order in which they started."""
        return self._read(self.folder)

    def write(self, trial: Trial) -> None:
        self.store.write_json(f"{self.folder}/{trial.name}.json", asdict(trial))

    def restart(self) -> None:
        """Makes all trials of this search run again, under their names and with their values.

        The values stay, since a trial may have left a checkpoint under its name, whose model has the shape that they
        give. No trial begins while the mark is there, so a restart that was cut off is simply done anew.
        """
        self.store.write_json(self._restart_mark, True)
        for trial in self.trials():
            self.store.delete(self._death_path(trial.name))
            self.write(Trial(trial.name, trial.values, trial.gflops, trial.parameters))
        self.store.delete(self._restart_mark)

    @property
    def restart_was_cut_off(self) -> bool:
        return self.store.exists(self._restart_mark)

    @property
    def _restart_mark(self) -> str:
        return f"{self.folder}/restart.json"

    def earlier(self, space: Space) -> list[Trial]:
        """Trials of other searches that had ended when this search started, and that belong to `space`.

        They are stored at the first call, so that a restarted search uses the same ones.
        """
        path = f"{self.folder}/earlier.json"
        if not self.store.exists(path):
            ended = [trial for other in self._others for trial in self._read(other) if trial.status != "running"]
            self.store.write_json(path, [asdict(trial) for trial in ended if space.contains(trial.values)])
        return [self._load(row) for row in self.store.read_json(path)]

    def write_death(self, trial: str, reason: str) -> None:
        """Stores the reason for which the process of a trial is about to end itself."""
        self.store.write_json(self._death_path(trial), self.mask(reason))

    def death(self, trial: str) -> str | None:
        """The reason for which the process of a trial has ended itself; None if it has not."""
        path = self._death_path(trial)
        return self.store.read_json(path) if self.store.exists(path) else None

    def _death_path(self, trial: str) -> str:
        return f"{self.folder}/death-of-{trial}.json"

    def _read(self, folder: str) -> list[Trial]:
        names = [name for name in self.store.list(folder) if name.startswith("trial-") and name.endswith(".json")]
        return [self._load(self.store.read_json(f"{folder}/{name}")) for name in names]

    def _load(self, row: Mapping[str, Any]) -> Trial:
        """The trial of a row, with the error masked: an earlier version of this project stored it as it was."""
        trial = Trial.from_dict(row)
        if trial.error:
            trial.error = self.mask(trial.error)
        return trial
