"""The driver: runs the tasks that are not done, shows and records how they get on, and says how it ended."""

import http.client
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline import workflow
from pipeline.config import Options, PipelineConfig
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
        workflow.TaskFailed, workflow.Stopped: as `workflow.run_tasks`.
    """
    config = options.config
    names = [task.name for task in TASKS]
    tasks = TASKS[: names.index(options.until) + 1] if options.until else TASKS
    with Progress(config) as progress:
        try:
            if options.force:
                workflow.forget(TASKS, workflow.following(TASKS, options.force), config, storage)
            manifests = workflow.done(tasks, config, storage)
            identity = workflow.run_identity(TASKS, config, storage)
        except OSError as error:
            raise ValueError(f"storage = {config.storage!r} cannot be read and written: {error}") from error
        cached = set(manifests)
        progress.cached(manifests)
        left_over = has_waiting(storage, identity)
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

        connect(config)
        from pipeline.runlog import RunLog

        signals = workflow.StopOnSignal(signal.SIGTERM, signal.SIGINT)
        log = RunLog(config, identity, preset, progress.say)
        log.done_before(manifests)
        try:
            with signals, log:
                manifests = workflow.run_tasks(tasks, config, storage, identity, signals, (progress, log))
        except (workflow.Stopped, workflow.TaskFailed):
            if log.unsent:
                print(f"warning: {log.unsent}", file=sys.stderr)
            raise
        return summarize(preset, config, manifests, cached, log.run_id, log.unsent)


def _send_left_over(
    preset: str, config: PipelineConfig, identity: str, progress: Progress
) -> tuple[str | None, Unsent | None]:
    """Sends what an earlier driver of a run that is done could not; returns the run's id and what is left."""
    from pipeline.runlog import flush, open_sender

    progress.say("sending records that the tracking server has not had")
    sender = open_sender(config, identity, preset)
    unsent = flush(sender, progress.say)
    return sender.run_id, unsent


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
