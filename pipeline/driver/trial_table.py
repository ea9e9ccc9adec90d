"""The trials of a search as a person sees them: a live table on a terminal, and lines elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pipeline.tasks.events import TrialChanged

STYLES = {"running": "bold", "finished": "green", "stopped early": "dim", "failed": "red"}
# Number of ended trials in the table; those that run are always shown.
MOST_ENDED = 8


class TrialTable:
    """The latest state of every trial.

    Args:
        num_trials: Number of trials of the search.
        epochs: Number of epochs of a trial that is not stopped early.
    """

    def __init__(self, num_trials: int, epochs: int) -> None:
        self._num_trials, self._epochs = num_trials, epochs
        self._trials: dict[str, TrialChanged] = {}
        self._left: float | None = None

    def update(self, trial: TrialChanged) -> str | None:
        """Takes the new state of a trial; returns a line for a log, or None if the change is not worth one."""
        before = self._trials.get(trial.trial)
        self._trials[trial.trial], self._left = trial, trial.seconds_left
        if trial.status != "running" and (before is None or before.status != "running"):
            return None  # it ended in an earlier attempt of the search, whose log has the line
        number = f"trial {_number(trial.trial)}/{self._num_trials}"
        best = "" if trial.best_value is None else f", best val_accuracy {trial.best_value:.4f}"
        if trial.status == "failed":
            return f"{number} failed in epoch {trial.epochs + 1}: {escape(str(trial.error))}; {self._time()}"
        if trial.status != "running":
            return f"{number} {trial.status} after epoch {trial.epochs}/{self._epochs}{best}; {self._time()}"
        if before is None:
            return f"{number} started: {escape(_values(trial.values))}, {trial.gflops:.3g} GFLOPs an image"
        if (metrics := trial.metrics) is None:
            return None
        return f"{number} epoch {trial.epochs}/{self._epochs}: " + ", ".join(
            f"{name} {metrics[name]:.4f}" for name in ("loss", "val_loss", "val_accuracy") if name in metrics
        )

    def table(self) -> Group:
        """The trials that run, then the best of those that have ended."""
        table = Table("trial", "values", "GFLOPs", "status", "epoch", "best val_accuracy", box=None, pad_edge=False)
        running = [trial for trial in self._trials.values() if trial.status == "running"]
        ended = [trial for trial in self._trials.values() if trial.status != "running"]
        # A failed trial is never the best, whatever value it had before.
        ended.sort(key=lambda trial: (trial.status == "failed", -(trial.best_value or 0.0)))
        for trial in [*running, *ended[:MOST_ENDED]]:
            style = STYLES[trial.status]
            table.add_row(
                trial.trial.rpartition("-")[2],
                escape(_values(trial.values)),
                f"{trial.gflops:.3g}",
                f"[{style}]{trial.status}[/{style}]",
                f"{trial.epochs}/{self._epochs}",
                "" if trial.best_value is None else f"{trial.best_value:.4f}",
            )
        return Group(f"search: {len(ended)} of {self._num_trials} trials ended, {self._time()}", table)

    def _time(self) -> str:
        return f"{'?' if self._left is None else duration(self._left)} left"


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(name: str) -> int:
    """The number of a trial, which is the same in every attempt of a search: 7 of `trial-0007`."""
    return int(name.rpartition("-")[2])


def _values(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.2e}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
