"""What a person sees while a run goes on: lines on a terminal with a live line below them, plain lines elsewhere."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from pipeline.config import PipelineConfig
from pipeline.trial_table import TrialTable, duration

# In a log, lines are not folded at the width of a terminal that is not there.
PLAIN_WIDTH = 200
# Seconds between the lines that tell in a log how an epoch gets on.
PLAIN_SECONDS = 60.0


class Progress:
    """Prints how the tasks of a run get on.

    Args:
        config: of the run.
        console: where to; standard output if not given.
    """

    def __init__(self, config: PipelineConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or make_console()
        self._status = self.console.status("starting")
        self._start = time.monotonic()
        self._trials = TrialTable(config.search.num_trials, config.search.epochs)
        self._steps: _Steps | None = None
        self._last_plain = self._start
        self._terminal_is_gone = False

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def hang_up(self) -> None:
        """Notes that standard output is a log from now on; may be called in a signal handler."""
        self._terminal_is_gone = True

    def say(self, text: str) -> None:
        self._follow_terminal()
        self.console.print(f"[dim]{time.monotonic() - self._start:7.1f} s[/dim]  {text}", highlight=False)

    def cached(self, names: Iterable[str]) -> None:
        for name in names:
            self.say(f"[green]{name:10}[/green] done before")

    def started(self, name: str) -> None:
        self._status.update(name)
        self.say(f"[bold]{name:10}[/bold] started")

    def done(self, name: str, manifest: Mapping[str, Any]) -> None:
        self.say(f"[green]{name:10}[/green] done in {manifest['seconds']:.1f} s")

    def event(self, event: dict[str, Any]) -> None:
        """The metrics of an epoch, how the epoch gets on, or what became of a trial."""
        self._follow_terminal()
        if event["task"] == "search":
            self._show_trial(event)
            return
        if "step" in event:
            self._show_step(event["task"], event["step"])
            return
        metrics = event["metrics"]
        self._last_plain = time.monotonic()
        self.say(
            f"{event['task']:10} epoch {metrics['epoch']}/{self.config.train.epochs}: loss {metrics['loss']:.4f}, "
            f"val_loss {metrics['val_loss']:.4f}, val_accuracy {metrics['val_accuracy']:.4f}, "
            f"{metrics['images_per_second']:.0f} images/s"
        )

    def _follow_terminal(self) -> None:
        """Ends the live line when there is no terminal any more."""
        if self._terminal_is_gone:
            self._terminal_is_gone = False
            self._status.stop()
            self.console = Console(file=self.console.file, force_terminal=False, highlight=False, width=PLAIN_WIDTH)

    def _show_trial(self, event: Mapping[str, Any]) -> None:
        """The table of all trials on a terminal, and a line for the log."""
        line = self._trials.take(event)
        if self.console.is_terminal:
            self._status.update(self._trials.table())
            if event["status"] in ("running", "stopped early") and event["error"] is None:
                return  # the table has it
        if line:
            self.say(f"{event['task']:10} {line}")

    def _show_step(self, task: str, step: Mapping[str, Any]) -> None:
        """The live line; where there is none, now and then a plain line."""
        if self._steps is None or step["epoch"] < self._steps.epoch:  # the first, or the workers were started again
            self._steps = _Steps(self.config.train.epochs)
        line = f"{task:10} {self._steps.line(step)}"
        if self.console.is_terminal:
            self._status.update(line)
        elif time.monotonic() - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self.say(line)


class _Steps:
    """A training from the first step that was seen of it: the time that is left follows from the steps since then.

    Validation and checkpoints are in that time, as soon as an epoch has ended.
    """

    def __init__(self, num_epochs: int) -> None:
        self.num_epochs, self.epoch = num_epochs, 0
        self._first: tuple[float, int] | None = None

    def line(self, step: Mapping[str, Any]) -> str:
        now, self.epoch = time.monotonic(), step["epoch"]
        done = (step["epoch"] - 1) * step["steps"] + step["step"]
        if self._first is None:
            self._first = now, done
        start, before = self._first
        left = "?"
        if done > before:
            left = duration((now - start) / (done - before) * (self.num_epochs * step["steps"] - done))
        parts = [
            f"epoch {step['epoch']}/{self.num_epochs}",
            f"step {step['step']}/{step['steps']}",
            f"{step['images_per_second']:.0f} images/s",
            f"loss {step['loss']:.4f}",
            f"accuracy {step['accuracy']:.4f}",
            f"{left} left",
        ]
        return ", ".join(parts)


def make_console() -> Console:
    """A console for standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
