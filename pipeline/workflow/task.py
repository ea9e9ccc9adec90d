"""What a task is, what it is given, and the errors that end it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.storage import Storage
from pipeline.workflow.channel import Channel

C = TypeVar("C")
"""Type of the configuration, which only the tasks know."""
Manifest = dict[str, Any]
"""What storage holds of a task that is done: its `output`, `key`, `section`, `inputs` and `seconds`."""


class TaskFailed(RuntimeError):
    """A task raised an error.

    Args:
        task: Name of the task.
        cause: The error that it raised.
    """

    def __init__(self, task: str, cause: BaseException) -> None:
        super().__init__(f"{task}: {cause}")
        self.task, self.cause = task, cause


class Stopped(Exception):
    """The run was stopped by the signal `signal`; the same command continues it."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class StoppedEarly(Exception):
    """Raised by a task that was asked to stop, after it has saved a state from which it can continue."""


@dataclass(frozen=True)
class Context(Generic[C]):
    """What a task is given.

    Attributes:
        config: Configuration of the run.
        storage: Where the task reads its inputs and writes its output.
        key: Key of the task.
        manifests: Manifest of each task from which this one follows, directly or not, by name.
        inputs: Output of each input task, by name.
        out: Storage prefix for what this attempt writes.
        state: Storage prefix that all attempts share.
        run_identity: Unique id of the run; the same for all attempts.
        channel: Carries events to the driver, and its stop request to the task.
    """

    config: C
    storage: Storage
    key: str
    manifests: Mapping[str, Manifest]
    inputs: Mapping[str, dict[str, Any]]
    out: str
    state: str
    run_identity: str
    channel: Channel


@dataclass(frozen=True)
class Task(Generic[C]):
    """A step of a run.

    Attributes:
        name: Name of the task, also in storage.
        version: Number that is raised by hand when the same settings come to give another output.
        inputs: Tasks whose outputs this one needs.
        section: Returns the settings that decide the output, as values that JSON can hold.
        run: Does the work and returns the output: small, and made of values that JSON can hold. Arrays are written to
            storage, and the output has their paths and digests.
        resources: Says in words what the task takes of the cluster.
        keeps_state: Whether an attempt continues from what earlier ones have saved, so that only one may run at a time.
        stoppable: Whether the task ends with `StoppedEarly` soon after a stop request. Others are abandoned.
        is_current: Whether an output in storage is still what this configuration asks for.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    section: Callable[[C], dict[str, Any]]
    run: Callable[[Context[C]], dict[str, Any]]
    resources: Callable[[C], str]
    keeps_state: bool = False
    stoppable: bool = False
    is_current: Callable[[C, dict[str, Any]], bool] = lambda config, output: True
