"""What a person sees while a run goes on: lines on a terminal with a live line below them, plain lines elsewhere."""

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.data.image_progress import ImageProgress
from pipeline.driver.trial_table import TrialTable, duration
from pipeline.masking import mask, printable
from pipeline.settings.config import PipelineConfig
from pipeline.tasks.events import CheckpointsDamaged, Said, TrialChanged, Warned
from pipeline.training.worker import EpochEnded, StepProgress, WorkersStarted

# In a log, lines are not folded at the width of a terminal that is not there.
PLAIN_WIDTH = 200
# Seconds between the lines with the position within an epoch or among the images, in a log.
PLAIN_SECONDS = 60.0
# Seconds after which a task that shows no sign of life says for what it waits.
WAIT_SECONDS = 30.0


class Progress:
    """Prints the progress of a run; an observer of its tasks.

    Args:
        config: Configuration of the run.
        console: Where to print; None: standard output.
    """

    def __init__(self, config: PipelineConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or make_console()
        self._status = self.console.status("starting")
        self._start = time.monotonic()
        self._trials = TrialTable(config.search.num_trials, config.search.epochs)
        self._time_left: _TimeLeft | None = None
        self._last_plain = self._start
        self._terminal_is_gone = False
        self._waits: dict[str, threading.Timer] = {}
        self._warned: set[Warned] = set()

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task in list(self._waits):
            self._has_begun(task)
        self._status.stop()

    def hang_up(self) -> None:
        """Notes that standard output is a log from now on; may be called in a signal handler."""
        self._terminal_is_gone = True

    def say(self, text: str) -> None:
        """Prints a line with the time since the start, without the passwords and keys in it."""
        self._follow_terminal()
        self.console.print(f"[dim]{time.monotonic() - self._start:7.1f} s[/dim]  {mask(text)}", highlight=False)

    def cached(self, names: Iterable[str]) -> None:
        """Prints the tasks that an earlier run has done."""
        for name in names:
            self.say(f"[green]{name:10}[/green] done before")

    def started(self, task: str) -> None:
        self._status.update(task)
        self.say(f"[bold]{task:10}[/bold] started")
        if what := self._awaited(task):
            self._wait(task, what)

    def _wait(self, task: str, what: str) -> None:
        """Says in a while for what a task waits, unless it has begun by then."""
        self._has_begun(task)
        line = f"{task:10} has waited {WAIT_SECONDS:.0f} s for {what}"
        self._waits[task] = threading.Timer(WAIT_SECONDS, self.say, [line])
        self._waits[task].daemon = True
        self._waits[task].start()

    def _awaited(self, task: str) -> str | None:
        """What a task needs of the cluster before it can begin, which may take long; None if it needs nothing."""
        train, search = self.config.train, self.config.search
        if task == "train":
            each = f"{train.cpus_per_worker:g} CPU{' and a GPU' if train.use_gpu else ''}"
            return f"{train.min_workers} workers with {each} each to start"
        if task == "search" and search.num_trials:
            each = f"{search.workers_per_trial * search.cpus_per_trial:g} CPU"
            return f"the first trial to start, which takes {each}{' and GPUs' if train.use_gpu else ''}"
        return None

    def _has_begun(self, task: str) -> None:
        if timer := self._waits.pop(task, None):
            timer.cancel()

    def done(self, task: str, manifest: Mapping[str, Any]) -> None:
        self._has_begun(task)
        self.say(f"[green]{task:10}[/green] done in {manifest['seconds']:.1f} s")

    def reported(self, event: object) -> None:
        self._follow_terminal()
        if isinstance(event, Said):
            self.say(f"{event.task:10} {escape(event.text)}")
        elif isinstance(event, Warned):
            self._warn(event)
        elif isinstance(event, CheckpointsDamaged):
            self.say(escape(f"{'train':10} warning: {event.warning}"))
        elif isinstance(event, WorkersStarted):
            for warning in filter(None, (event.open_ports, event.precision)):
                self._warn(Warned("train", warning))
            workers = escape(", ".join(event.addresses))
            self._wait("train", f"the workers at {workers} to find each other and to take their first step")
        elif isinstance(event, TrialChanged):
            self._has_begun("search")
            self._show_trial(event)
        elif isinstance(event, StepProgress):
            self._has_begun("train")
            self._show_step(event)
        elif isinstance(event, ImageProgress):
            self._show_live(
                f"{event.task:10} {event.images:,} of {event.total:,} images {event.step}, "
                f"{event.images * event.image_bytes / 1e6:,.0f} of {event.total * event.image_bytes / 1e6:,.0f} MB of "
                f"pixels, {event.images_per_second:,.0f} images/s, {duration(event.seconds_left)} left"
            )
        elif isinstance(event, EpochEnded):
            self._show_epoch(event.metrics)

    def _warn(self, warning: Warned) -> None:
        if warning not in self._warned:  # workers that start again, and every trial, find the same
            self._warned.add(warning)
            self.say(escape(f"{warning.task:10} warning: {warning.text}"))

    def _follow_terminal(self) -> None:
        """Ends the live line when there is no terminal any more."""
        if self._terminal_is_gone:
            self._terminal_is_gone = False
            self._status.stop()
            self.console = _Console(file=self.console.file, force_terminal=False, highlight=False, width=PLAIN_WIDTH)

    def _show_trial(self, trial: TrialChanged) -> None:
        """The table of all trials on a terminal, and a line for the log."""
        line = self._trials.update(trial)
        if self.console.is_terminal:
            self._status.update(self._trials.table())
            if trial.status in ("running", "stopped early") and trial.error is None:
                return  # the table shows it
        if line:
            self.say(f"{'search':10} {line}")

    def _show_step(self, step: StepProgress) -> None:
        # The first step, or the workers were started again.
        if self._time_left is None or step.epoch < self._time_left.epoch:
            self._time_left = _TimeLeft(self.config.train.epochs)
        left = self._time_left.after(step)
        parts = [
            f"epoch {step.epoch}/{self.config.train.epochs}",
            f"step {step.step}/{step.steps}",
            f"{step.images_per_second:.0f} images/s",
            f"loss {step.loss:.4f}",
            f"accuracy {step.accuracy:.4f}",
            f"{'?' if left is None else duration(left)} left",
        ]
        self._show_live(f"{'train':10} {', '.join(parts)}")

    def _show_live(self, line: str) -> None:
        """The live line; a plain line now and then where there is no terminal."""
        if self.console.is_terminal:
            self._status.update(line)
        elif time.monotonic() - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self.say(line)

    def _show_epoch(self, metrics: Mapping[str, float]) -> None:
        self._last_plain = time.monotonic()
        self.say(
            f"{'train':10} epoch {metrics['epoch']}/{self.config.train.epochs}: loss {metrics['loss']:.4f}, "
            f"val_loss {metrics['val_loss']:.4f}, val_accuracy {metrics['val_accuracy']:.4f}, "
            f"{metrics['images_per_second']:.0f} images/s"
        )


class _TimeLeft:
    """Estimates the time that a training still takes from the steps since the first one that was seen.

    Validation and checkpoints are part of that time as soon as an epoch has ended.
    """

    def __init__(self, num_epochs: int) -> None:
        self.num_epochs, self.epoch = num_epochs, 0
        self._first: tuple[float, int] | None = None

    def after(self, step: StepProgress) -> float | None:
        """Seconds that are left; None after the first step."""
        now, self.epoch = time.monotonic(), step.epoch
        done = (step.epoch - 1) * step.steps + step.step
        if self._first is None:
            self._first = now, done
        start, before = self._first
        if done <= before:
            return None
        return (now - start) / (done - before) * (self.num_epochs * step.steps - done)


def make_console() -> Console:
    """A console for standard output, which shows the control characters in a text instead of obeying them."""
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=PLAIN_WIDTH)


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)
