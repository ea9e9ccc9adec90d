"""Durable tasks on Ray: a task whose manifest is in storage is done, for ever and for every driver.

    tasks/<name>/<key>/manifest.json         putting it is the commit; an object store has no rename
    tasks/<name>/<key>/attempt-<run>-<id>/   what an attempt wrote; the manifest names the attempt that counts
    tasks/<name>/<key>/state/                what outlives an attempt that was cut off: checkpoints, a search's state
    runs/<key>.json                          names the run in other systems
    drivers/<key>/                           who works at the run, or at a task with a state; see `pipeline.lease`

Only the driver commits, so that an attempt which outlives its driver comes to nothing, however it ends.

A key is the SHA-256 of the task's name, its code version, the settings that decide its output and the keys of its
inputs, so all keys are known before anything runs.
"""

import hashlib
import json
import math
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import ray

from pipeline.board import Board
from pipeline.config import PipelineConfig
from pipeline.storage import Storage

Manifest = dict[str, Any]
POLL_SECONDS = 0.25
# A checkpoint within the step: time for the first step of all, whose tracing cannot be cut short.
STOP_SECONDS = 180.0


class TaskFailed(RuntimeError):
    """A task raised; `cause` is what it raised."""

    def __init__(self, task: str, cause: BaseException) -> None:
        super().__init__(f"{task}: {cause}")
        self.task, self.cause = task, cause


class Stopped(Exception):
    """The run was asked to stop by `signal`, and can go on when started again."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class StoppedEarly(Exception):
    """Raised by a task that was asked to stop and has left a state to go on from."""


@dataclass(frozen=True)
class Context:
    """What a task gets.

    Attributes:
        inputs: output of each input task, by name.
        out: storage prefix for what this attempt writes.
        state: storage prefix that all attempts share.
        run_identity: names this run of the pipeline in other systems; the same for all attempts.
    """

    config: PipelineConfig
    storage: Storage
    key: str
    inputs: Mapping[str, dict[str, Any]]
    out: str
    state: str
    run_identity: str
    board: Board


@dataclass(frozen=True)
class Task:
    """A step of the pipeline.

    Attributes:
        version: raised by hand when the same settings come to give another output.
        inputs: tasks whose outputs this one needs.
        section: the settings that decide the output, JSON-able.
        run: does the work and returns the output, small and JSON-able: paths and digests, never arrays.
        resources: what it takes of the cluster, in words.
        keeps_state: whether an attempt goes on from what others have left, so that there must be one at a time.
        stoppable: whether it ends with `StoppedEarly` soon after a stop request; others are simply left.
        is_current: whether an output that is in storage is still what this configuration asks for.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    section: Callable[[PipelineConfig], dict[str, Any]]
    run: Callable[[Context], dict[str, Any]]
    resources: Callable[[PipelineConfig], str]
    keeps_state: bool = False
    stoppable: bool = False
    is_current: Callable[[PipelineConfig, dict[str, Any]], bool] = lambda config, output: True


class Observer(Protocol):
    """Is told how the tasks get on."""

    def started(self, task: str) -> None: ...

    def event(self, event: dict[str, Any]) -> None: ...

    def done(self, task: str, manifest: Manifest) -> None: ...


class StopOnSignal:
    """While entered, the first of `signals` is noted instead of ending the process; a second one ends it."""

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self.received: int | None = None

    def __enter__(self) -> "StopOnSignal":
        self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number


def task_keys(tasks: Iterable[Task], config: PipelineConfig) -> dict[str, str]:
    """Key of each of `tasks`, which are in an order that puts inputs first."""
    keys: dict[str, str] = {}
    for task in tasks:
        parts = {
            "task": task.name,
            "version": task.version,
            "section": task.section(config),
            "inputs": {name: keys[name] for name in task.inputs},
        }
        keys[task.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return keys


def done(tasks: Iterable[Task], config: PipelineConfig, storage: Storage) -> dict[str, Manifest]:
    """Manifests of those of `tasks` that need not run: committed, current, and so are all that they follow from."""
    found: dict[str, Manifest] = {}
    for task, key in zip(tasks, task_keys(tasks, config).values(), strict=True):
        path = _manifest_path(task.name, key)
        if all(name in found for name in task.inputs) and storage.exists(path):
            manifest = storage.read_json(path)
            if task.is_current(config, manifest["output"]):
                found[task.name] = manifest
    return found


def following(tasks: Iterable[Task], names: Iterable[str]) -> set[str]:
    """`names` and all tasks that follow from them."""
    found = set(names)
    for task in tasks:
        if found & set(task.inputs):
            found.add(task.name)
    return found


def forget(tasks: Sequence[Task], names: Iterable[str], config: PipelineConfig, storage: Storage) -> None:
    """Takes back that the tasks `names` are done, and what they left to go on from; it is another run from then on."""
    keys = task_keys(tasks, config)
    for name in names:
        storage.delete(_manifest_path(name, keys[name]))  # first: half of a tree is then no finished task
        storage.delete(f"tasks/{name}/{keys[name]}")
    storage.delete(_identity_path(tasks, config))


def run_identity(tasks: Sequence[Task], config: PipelineConfig, storage: Storage) -> str:
    """Names the run of `tasks`, all of the pipeline's, in other systems: the same until it is forgotten."""
    path = _identity_path(tasks, config)
    if not storage.exists(path):
        storage.write_json(path, {"identity": uuid.uuid4().hex})
    return storage.read_json(path)["identity"]


def run_tasks(
    tasks: Sequence[Task],
    config: PipelineConfig,
    storage: Storage,
    identity: str,
    stop: StopOnSignal,
    observers: Sequence[Observer],
    fence: Callable[[], None] = lambda: None,
) -> dict[str, Manifest]:
    """Runs what is not done of `tasks`, each as soon as its inputs are there; Ray must be up.

    Args:
        fence: raises before a commit if this driver may not work at the run any more.

    Returns:
        The manifests of all tasks by name.

    Raises:
        TaskFailed: when a task has raised, after those that run beside it have ended.
        Stopped: after a signal; a stoppable task has then left a state to go on from.
    """
    keys, manifests = task_keys(tasks, config), done(tasks, config, storage)
    board = Board()
    running: dict[ray.ObjectRef, Task] = {}
    waiting = [task for task in tasks if task.name not in manifests]
    failure: TaskFailed | None = None
    deadline = math.inf
    while True:
        if stop.received and deadline == math.inf:
            deadline = time.monotonic() + STOP_SECONDS
            board.request_stop()
        if stop.received and (not any(task.stoppable for task in running.values()) or time.monotonic() > deadline):
            raise Stopped(stop.received)
        ready = [task for task in waiting if all(name in manifests for name in task.inputs)]
        for task in ready if failure is None and not stop.received else ():
            waiting.remove(task)
            inputs = {name: manifests[name]["output"] for name in task.inputs}
            running[_execute.remote(task, keys, config, storage, inputs, identity, board)] = task
            for observer in observers:
                observer.started(task.name)
        if not running:
            break
        ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for event in board.take():
            for observer in observers:
                observer.event(event)
        for reference in ended:
            task = running.pop(reference)
            try:
                manifest = ray.get(reference)
            except ray.exceptions.RayError as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                if not isinstance(cause, StoppedEarly):
                    failure = failure or TaskFailed(task.name, cause)
                    failure.__cause__ = error
                continue
            fence()
            manifests[task.name] = _commit(task, manifest, config, storage, identity)
            for observer in observers:
                observer.done(task.name, manifests[task.name])
    if failure is not None:
        raise failure
    return manifests


# Repeated when its process dies, and when one on which it relies dies: a trainer's controller, say.
@ray.remote(num_cpus=0, retry_exceptions=[ray.exceptions.ActorDiedError])  # type: ignore[call-overload]
def _execute(
    task: Task,
    keys: dict[str, str],
    config: PipelineConfig,
    storage: Storage,
    inputs: Mapping[str, dict[str, Any]],
    identity: str,
    board: Board,
) -> Manifest:
    """One attempt, on whichever node has room: it holds no CPU itself, what it starts does."""
    key = keys[task.name]
    home = f"tasks/{task.name}/{key}"
    attempt = f"{_attempts_of(identity)}{uuid.uuid4().hex[:12]}"
    start = time.time()
    output = task.run(
        Context(
            config=config,
            storage=storage,
            key=key,
            inputs=inputs,
            out=f"{home}/{attempt}",
            state=f"{home}/state",
            run_identity=identity,
            board=board,
        )
    )
    return {
        "task": task.name,
        "version": task.version,
        "key": key,
        "inputs": {name: keys[name] for name in task.inputs},
        "section": task.section(config),
        "attempt": attempt,
        "started": start,
        "seconds": round(time.time() - start, 3),
        "output": output,
    }


def _commit(task: Task, manifest: Manifest, config: PipelineConfig, storage: Storage, identity: str) -> Manifest:
    """Makes the attempt of `manifest` count, removes this run's other ones; returns the manifest that counts.

    That is another one where another run, which has this task in common, has been quicker. Its attempts are left alone.
    """
    home, path = f"tasks/{task.name}/{manifest['key']}", _manifest_path(task.name, manifest["key"])
    quicker = storage.read_json(path) if storage.exists(path) else None
    if quicker is not None and task.is_current(config, quicker["output"]):
        manifest = quicker
    else:
        storage.write_json(path, manifest)
    for name in storage.list(home):
        if name.startswith(_attempts_of(identity)) and name != manifest["attempt"]:
            storage.delete(f"{home}/{name}")
    return manifest


def _attempts_of(identity: str) -> str:
    return f"attempt-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-"


def run_key(tasks: Sequence[Task], config: PipelineConfig) -> str:
    """Key of the run of `tasks`, all of the pipeline's: that of the last one, which all settings decide."""
    return task_keys(tasks, config)[tasks[-1].name]


def _identity_path(tasks: Sequence[Task], config: PipelineConfig) -> str:
    return f"runs/{run_key(tasks, config)}.json"


def _manifest_path(name: str, key: str) -> str:
    return f"tasks/{name}/{key}/manifest.json"
