"""What a person sees while a run goes on: lines on a terminal with a spinner below them, plain lines elsewhere."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config import PipelineConfig

# In a log, lines are not folded at the width of a terminal that is not there.
PLAIN_WIDTH = 200


class Progress:
    """Prints how the tasks of a run get on."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.console = make_console()
        self._status = self.console.status("starting")
        self._start = time.monotonic()
        self._trials: dict[str, int] = {}

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def say(self, text: str) -> None:
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
        metrics = event["metrics"]
        epoch = f"epoch {metrics['epoch']}"
        if event["task"] == "search":
            number = self._trials.setdefault(event["trial"], len(self._trials) + 1)
            values = escape(" ".join(f"{name}={_short(value)}" for name, value in event["values"].items()))
            epoch = f"trial {number}/{self.config.search.num_trials} ({values}) {epoch}/{self.config.search.epochs}"
        else:
            epoch += f"/{self.config.train.epochs}"
        self.say(
            f"{event['task']:10} {epoch}: loss {metrics['loss']:.4f}, val_loss {metrics['val_loss']:.4f}, "
            f"val_accuracy {metrics['val_accuracy']:.4f}, {metrics['images_per_second']:.0f} images/s"
        )


def make_console() -> Console:
    """A console for standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _short(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
