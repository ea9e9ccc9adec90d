"""Executes the tasks of a run that are not done, and commits what they return.

Only the driver commits, so that an attempt which outlives its driver has no effect, however it ends.
"""

import contextlib
import hashlib
import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import ray

from pipeline.workflow.channel import Channel
from pipeline.workflow.run import Run
from pipeline.workflow.task import Context, Manifest, Stopped, StoppedEarly, Task, TaskFailed

POLL_SECONDS = 0.25
# A checkpoint within the step, and time for the first step of all, whose tracing cannot be cut short.
STOP_SECONDS = 180.0


class Observer(Protocol):
    """Follows the progress of the tasks."""

    def started(self, task: str) -> None:
        """A task has started."""

    def reported(self, event: object) -> None:
        """A process of a task has reported an event."""

    def done(self, task: str, manifest: Manifest) -> None:
        """A task is committed."""


class StopOnSignal:
    """While entered, the first of `signals` is noted instead of ending the process; a second one ends it.

    In another thread than the main one nothing is noted, because Python lets only that one handle signals.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self.received: int | None = None

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
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


def run_tasks(
    run: Run[Any],
    tasks: Sequence[Task[Any]],
    stop: StopOnSignal,
    observers: Sequence[Observer],
    fence: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Manifest]:
    """Executes those of `tasks` that are not done, each as soon as its inputs are there. Ray must be up.

    Args:
        run: The run to which the tasks belong.
        tasks: The first tasks of the run, or all of them.
        stop: Notes the signal by which the run is asked to stop.
        observers: Called in this process when a task starts, reports an event or is done.
        fence: Raises before a commit if this driver may not work at the run any more.
        say: Gets a line for a person who waits.

    Returns:
        The manifests of all of `tasks` by name.

    Raises:
        TaskFailed: if a task has raised an error, after those that run beside it have ended.
        Stopped: after a signal. A stoppable task has then saved a state from which it can continue.
    """
    done, identity, channel = run.done(), run.identity(), Channel()
    stale = {task.name: old["attempt"] for task in run.tasks if task.name not in done and (old := run.written(task))}
    manifests = {task.name: done[task.name] for task in tasks if task.name in done}
    running: dict[ray.ObjectRef, Task[Any]] = {}
    waiting = [task for task in tasks if task.name not in manifests]
    failure: TaskFailed | None = None
    deadline = math.inf
    while True:
        received = stop.received  # once, since a signal may come between two looks at it
        if received and deadline == math.inf:
            deadline = time.monotonic() + STOP_SECONDS
            if stopping := [task.name for task in running.values() if task.stoppable]:
                say(
                    f"stopping: waits up to {STOP_SECONDS:g} s for {' and '.join(stopping)} to save what is done; "
                    "a second signal ends the command without that"
                )
            channel.request_stop()
        if received and (not any(task.stoppable for task in running.values()) or time.monotonic() > deadline):
            raise Stopped(received)
        ready = [task for task in waiting if all(name in manifests for name in task.inputs)]
        for task in ready if failure is None and not received else ():
            waiting.remove(task)
            preceding = {name: manifests[name] for name in manifests if name in run.preceding(task.name)}
            running[_execute.remote(task, run, preceding, identity, channel)] = task
            for observer in observers:
                observer.started(task.name)
        if not running:
            break
        ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for event in channel.take():
            for observer in observers:
                observer.reported(event)
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
            manifests[task.name] = _commit(run, task, manifest, identity, stale)
            for observer in observers:
                observer.done(task.name, manifests[task.name])
    if failure is not None:
        raise failure
    return manifests


# Repeated when its process dies, and when an actor on which it relies dies, such as the controller of a trainer.
@ray.remote(num_cpus=0, retry_exceptions=[ray.exceptions.ActorDiedError])  # type: ignore[call-overload]
def _execute(
    task: Task[Any], run: Run[Any], manifests: Mapping[str, Manifest], identity: str, channel: Channel
) -> Manifest:
    """One attempt, on whichever node has room. It holds no CPU itself; the workers that it starts do."""
    home, attempt = run.home(task.name), f"{_attempts_of(identity)}{uuid.uuid4().hex[:12]}"
    started, begin = time.time(), time.perf_counter()  # a duration by a clock that nobody sets
    output = task.run(
        Context(
            config=run.config,
            storage=run.storage,
            key=run.keys[task.name],
            manifests=manifests,
            inputs={name: manifests[name]["output"] for name in task.inputs},
            out=f"{home}/{attempt}",
            state=f"{home}/state",
            run_identity=identity,
            channel=channel,
        )
    )
    return {
        "task": task.name,
        "version": task.version,
        "key": run.keys[task.name],
        "inputs": {name: run.keys[name] for name in task.inputs},
        "section": task.section(run.config),
        "attempt": attempt,
        "started": started,
        "seconds": round(time.perf_counter() - begin, 3),
        "output": output,
    }


def _commit(run: Run[Any], task: Task[Any], manifest: Manifest, identity: str, stale: Mapping[str, str]) -> Manifest:
    """Commits the attempt of `manifest` and removes the other attempts of this run; returns the manifest that counts.

    That is another manifest where another run that shares this task was quicker. Its attempts are left alone.

    Args:
        stale: The attempts whose manifests were in storage when this driver began, by the names of their tasks, which
            were not done all the same. They are those of no quicker run.
    """
    # Before the commit: if this driver is killed after it, they would count as made from the new output.
    for other in run.tasks:
        if other is not task and other.name in stale and other.name in run.following([task.name]):
            old = run.written(other)
            if old and old["attempt"] == stale[other.name]:
                run.storage.delete(run.manifest_path(other.name))
    quicker = run.committed(task)
    if quicker and quicker["attempt"] != stale.get(task.name):
        manifest = quicker
    else:
        run.storage.write_json(run.manifest_path(task.name), manifest)
    home = run.home(task.name)
    with contextlib.suppress(OSError):  # what cannot be deleted, such as a file that is open on NFS, ends no run
        for name in run.storage.list(home):
            if name.startswith(_attempts_of(identity)) and name != manifest["attempt"]:
                run.storage.delete(f"{home}/{name}")
    return manifest


def _attempts_of(identity: str) -> str:
    return f"attempt-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-"
