"""The driver: runs the tasks that are not done, shows and records how they get on, and says how it ended."""

import contextlib
import http.client
import json
import os
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline import workflow
from pipeline.command_line import Options
from pipeline.config import PipelineConfig
from pipeline.lease import Claim, Lease, LeaseLost
from pipeline.progress import Progress, make_console
from pipeline.storage import Storage
from pipeline.summary import show_plan, show_summary, summarize
from pipeline.tasks import TASKS
from pipeline.tracking_buffer import Unsent, has_waiting

ANSWER_SECONDS = 1.5


def drive(preset: str, options: Options) -> int:
    """Does what `options` ask for; returns the exit code.

    Raises:
        ValueError: if a setting or the data cannot be used.
    """
    storage = Storage(options.config.storage)
    if options.dry_run:
        show_plan(preset, options, storage, make_console())
        return 0
    try:
        summary = run(preset, options, storage)
    except workflow.Stopped as stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.signal
    except LeaseLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return 1
    except workflow.TaskFailed as failed:
        if isinstance(failed.cause, ValueError):
            raise failed.cause from failed
        print(f"error: {failed}\n{failed.__cause__}", file=sys.stderr)
        return 1
    show_summary(summary, make_console())
    if options.summary_json:
        Path(options.summary_json).write_text(json.dumps(summary, indent=1) + "\n")
    if unsent := summary["mlflow"]["unsent"]:
        print(f"error: {unsent}", file=sys.stderr)
    return 1 if unsent else 0


def run(preset: str, options: Options, storage: Storage) -> dict[str, Any]:
    """Runs the tasks that are not done; returns the summary.

    Raises:
        ValueError: if the storage cannot be used, the tracking server does not answer or the cluster is too small.
        workflow.TaskFailed, workflow.Stopped, LeaseLost: as `workflow.run_tasks`, `Lease.check`.
    """
    config = options.config
    names = [task.name for task in TASKS]
    tasks = TASKS[: names.index(options.until) + 1] if options.until else TASKS
    with Progress(config) as progress, contextlib.ExitStack() as held:
        follow = _Follow(tasks, config, storage, progress)
        try:
            keys = _keys_to_hold(tasks, options, storage)
            lease = Lease(storage, keys, follow)
            if keys:
                held.enter_context(lease)
            if options.force:
                workflow.forget(TASKS, workflow.following(TASKS, options.force), config, storage)
            # Read with the lease, since another driver may have done, begun or forgotten them meanwhile.
            manifests = workflow.done(tasks, config, storage)
            identity = workflow.run_identity(TASKS, config, storage)
            left_over = has_waiting(storage, identity)
        except OSError as error:
            raise ValueError(f"storage = {config.storage!r} cannot be read and written: {error}") from error
        cached = set(manifests)
        progress.cached(manifests)
        if len(cached) == len(tasks) and not left_over:
            return summarize(preset, config, manifests, cached)
        # Neither library shall call home from somebody's cluster unless told to; they read this when imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # Imported here, since a run whose tasks are all done needs neither a cluster nor MLflow.
        if len(cached) == len(tasks):
            return summarize(preset, config, manifests, cached, *_send_left_over(preset, config, identity, progress))
        try:
            check_server(config.tracking_uri)
        except ValueError as error:
            if not left_over:
                raise
            progress.say(f"records wait in {storage.absolute('tracking')}: {escape(str(error))}")
        from pipeline.cluster import connect

        if connect(config, storage, progress.say):
            _outlive_terminal(progress)
        from pipeline.runlog import RunLog

        signals = workflow.StopOnSignal(signal.SIGTERM, signal.SIGINT)
        log = RunLog(config, identity, preset, progress.say)
        log.done_before(manifests)
        observers = (progress, log, _Release(lease))
        try:
            with signals, log:
                manifests = workflow.run_tasks(tasks, config, storage, identity, signals, observers, lease.check)
        except (workflow.Stopped, workflow.TaskFailed):
            if log.unsent:
                print(f"warning: {log.unsent}", file=sys.stderr)
            raise
        return summarize(preset, config, manifests, cached, log.run_id, log.unsent)


def _keys_to_hold(tasks: Sequence[workflow.Task], options: Options, storage: Storage) -> list[str]:
    """Of the run, and of its tasks that other runs may share and that keep a state; none if there is nothing to do."""
    config = options.config
    finished = workflow.done(tasks, config, storage).keys() - workflow.following(TASKS, options.force)
    if len(finished) == len(tasks) and not has_waiting(storage, workflow.run_identity(TASKS, config, storage)):
        return []
    keys = workflow.task_keys(TASKS, config)
    shared = [keys[task.name] for task in tasks if task.keeps_state and task.name not in finished]
    return [workflow.run_key(TASKS, config), *shared]


def _send_left_over(
    preset: str, config: PipelineConfig, identity: str, progress: Progress
) -> tuple[str | None, Unsent | None]:
    """Sends what an earlier driver of a run that is done could not; returns the run's id and what is left."""
    from pipeline.runlog import flush, open_sender

    progress.say("sending records that the tracking server has not had")
    sender = open_sender(config, identity, preset)
    unsent = flush(sender, progress.say)
    return sender.run_id, unsent


class _Follow:
    """Tells how the driver gets on that works at this run, or at a task of it, while one waits for it."""

    def __init__(
        self, tasks: Sequence[workflow.Task], config: PipelineConfig, storage: Storage, progress: Progress
    ) -> None:
        self._tasks, self._config, self._storage, self._progress = tasks, config, storage, progress
        self._run = workflow.run_key(TASKS, config)
        self._task_of = {key: name for name, key in workflow.task_keys(TASKS, config).items()}
        self._told: tuple[str, str, int] | None = None
        self._known: set[str] = set()

    def __call__(self, key: str, claim: Claim) -> None:
        manifests = workflow.done(self._tasks, self._config, self._storage)
        if self._told != (key, claim.host, claim.pid):
            self._told, self._known = (key, claim.host, claim.pid), set(manifests)
            what = "this run" if key == self._run else f"the same {self._task_of[key]} for another run"
            self._progress.say(f"process {claim.pid} on {escape(claim.host)} works at {what}: waiting for it")
        for name in manifests.keys() - self._known:
            self._known.add(name)
            self._progress.done(name, manifests[name])


class _Release:
    """Lets other runs have a task that is done; an observer of the tasks."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def started(self, task: str) -> None:
        pass

    def event(self, event: dict[str, Any]) -> None:
        pass

    def done(self, task: str, manifest: workflow.Manifest) -> None:
        if task != TASKS[-1].name:  # that one's key stands for the run
            self._lease.release(manifest["key"])


def _outlive_terminal(progress: Progress) -> None:
    """Lets a run on a cluster go on when the ssh connection of its driver ends; what it says then goes to a file."""
    log = Path(tempfile.gettempdir()) / f"perceiver-pipeline-{os.getpid()}.log"

    def hang_up(*_: object) -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file, stream.fileno())
        progress.hang_up()

    signal.signal(signal.SIGHUP, hang_up)


def check_server(tracking_uri: str) -> None:
    """Asks a tracking server for an experiment; MLflow itself would go on asking one that is not there for minutes.

    Raises:
        ValueError: if no MLflow server answers within `ANSWER_SECONDS`.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        return
    url = f"{tracking_uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            return  # it wants a login, which MLflow has
        raise ValueError(
            f"tracking.uri = {tracking_uri}: no MLflow server answers ({error}): start one (`mlflow server`), or leave "
            "the option out to record in the storage folder"
        ) from error
