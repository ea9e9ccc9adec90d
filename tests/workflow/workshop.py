"""Helpers of the tests of durable tasks: small tasks that run on a real Ray, and their storage."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.workflow.run import Run
from pipeline.workflow.runner import StopOnSignal, run_tasks
from pipeline.workflow.task import Context, Manifest, Task

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

CONFIG = quickstart()
PATIENCE = 60.0


def changed(section: str, **changes: Any) -> PipelineConfig:
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **changes)})


def wait_until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path} does not appear")


class Workshop:
    """A storage, tasks that append a line to a file of their name whenever they run, and the events of the driver."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "runs"))
        self.observed: list[tuple[str, Any]] = []

    def task(self, name: str, *inputs: str, work: Callable[[Context], Any] = lambda context: None, **more: Any) -> Task:
        folder = self.folder

        def run(context: Context) -> dict[str, Any]:
            with open(folder / name, "a") as file:
                file.write(f"{os.getpid()}\n")
            return {"result": work(context), "from": {key: value["result"] for key, value in context.inputs.items()}}

        section: Callable[[PipelineConfig], dict[str, Any]] = lambda config: {"seed": config.data.seed}  # noqa: E731
        return Task(name, 1, inputs, section, run, lambda config: "nothing", **more)

    def executions(self, *names: str) -> list[int]:
        paths = [self.folder / name for name in names]
        return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]

    def plan(self, tasks: Sequence[Task], config: PipelineConfig = CONFIG) -> Run[PipelineConfig]:
        return Run(tuple(tasks), config, self.storage)

    def run(
        self, tasks: Sequence[Task], config: PipelineConfig = CONFIG, stop: StopOnSignal | None = None
    ) -> dict[str, Manifest]:
        return run_tasks(self.plan(tasks, config), tasks, stop or StopOnSignal(), [self])

    def started(self, task: str) -> None:
        self.observed.append(("started", task))

    def reported(self, event: object) -> None:
        self.observed.append(("reported", event))

    def done(self, task: str, manifest: Manifest) -> None:
        self.observed.append(("done", task))


def chain(shop: Workshop) -> list[Task]:
    return [shop.task("a"), shop.task("b", "a"), shop.task("c", "b")]
