"""What a person sees of a search: a table that changes on a terminal, a line for each epoch and each end elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

STYLES = {"running": "bold", "finished": "green", "stopped early": "dim", "failed": "red"}
# Of the trials that have ended; those that run are always shown.
MOST_ENDED = 8


class TrialTable:
    """The trials of a search, as far as events tell of them.

    Args:
        num_trials: in all.
        epochs: of a trial that is not stopped.
    """

    def __init__(self, num_trials: int, epochs: int) -> None:
        self._num_trials, self._epochs = num_trials, epochs
        self._trials: dict[str, Mapping[str, Any]] = {}
        self._left: float | None = None

    def take(self, event: Mapping[str, Any]) -> str | None:
        """Takes an event; returns what it means in words, None if that is not worth a line."""
        name, before = event["trial"], self._trials.get(event["trial"])
        self._trials[name], self._left = event, event["left"]
        number = f"trial {list(self._trials).index(name) + 1}/{self._num_trials}"
        best = "" if event["best_value"] is None else f", best val_accuracy {event['best_value']:.4f}"
        if event["status"] == "failed":
            return f"{number} failed in epoch {event['epoch'] + 1}: {escape(str(event['error']))}; {self._time()}"
        if event["status"] != "running":
            return f"{number} {event['status']} after epoch {event['epoch']}/{self._epochs}{best}; {self._time()}"
        if before is None:
            return f"{number} started: {escape(_values(event['values']))}, {event['gflops']:.3g} GFLOPs an image"
        if "metrics" not in event:
            return None
        metrics = event["metrics"]
        return f"{number} epoch {event['epoch']}/{self._epochs}: " + ", ".join(
            f"{name} {metrics[name]:.4f}" for name in ("loss", "val_loss", "val_accuracy") if name in metrics
        )

    def table(self) -> Group:
        """Trials that run, then the best of the others."""
        table = Table("trial", "values", "GFLOPs", "status", "epoch", "best val_accuracy", box=None, pad_edge=False)
        running = [event for event in self._trials.values() if event["status"] == "running"]
        ended = [event for event in self._trials.values() if event["status"] != "running"]
        ended.sort(key=lambda event: -1.0 if event["best_value"] is None else event["best_value"], reverse=True)
        for event in [*running, *ended[:MOST_ENDED]]:
            style, best = STYLES[event["status"]], event["best_value"]
            table.add_row(
                event["trial"].rpartition("-")[2],
                escape(_values(event["values"])),
                f"{event['gflops']:.3g}",
                f"[{style}]{event['status']}[/{style}]",
                f"{event['epoch']}/{self._epochs}",
                "" if best is None else f"{best:.4f}",
            )
        return Group(f"search: {len(ended)} of {self._num_trials} trials ended, {self._time()}", table)

    def _time(self) -> str:
        return f"{'?' if self._left is None else duration(self._left)} left"


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _values(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.2e}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
