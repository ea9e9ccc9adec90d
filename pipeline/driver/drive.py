"""What the command does: runs the tasks that are not done, shows and records their progress, and reports the end."""

import contextlib
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline.command import say_error
from pipeline.driver.hang_up import outlive_terminal
from pipeline.driver.progress import Progress, make_console
from pipeline.driver.summary import NEWEST_REPORT, show_plan, show_summary, summarize
from pipeline.driver.window import check_window
from pipeline.masking import mask
from pipeline.settings.command_line import Options
from pipeline.settings.config import PipelineConfig
from pipeline.storage import CorruptFileError, open_storage
from pipeline.tasks.graph import TASKS
from pipeline.tasks.steps import check_initial_model
from pipeline.tracking.outbox import Unsent, has_waiting
from pipeline.tracking.server import check_server
from pipeline.workflow.lease import Claim, Lease, LeaseLost
from pipeline.workflow.run import Run
from pipeline.workflow.runner import StopOnSignal, run_tasks
from pipeline.workflow.task import Manifest, Stopped, Task, TaskFailed

Tasks = Sequence[Task[PipelineConfig]]


def drive(preset: str, options: Options) -> int:
    """Does what `options` ask for; returns the exit code.

    Raises:
        ValueError: if a setting or the data cannot be used.
    """
    check_window(options.config)
    run = Run(TASKS, options.config, open_storage(options.config.storage))
    if options.dry_run:
        show_plan(preset, options, run, make_console())
        return 0
    try:
        summary = execute(preset, options, run)
    except Stopped as stopped:
        say_error("stopped; the same command goes on from here")
        return 128 + stopped.signal
    except LeaseLost as lost:
        say_error(f"error: {lost}")
        return 1
    except TaskFailed as failed:
        if isinstance(failed.cause, ValueError):
            raise failed.cause from failed
        # An error of this project, or of a disk, says all that a person needs; of any other the traceback is needed.
        own = type(failed.cause).__module__.partition(".")[0] in ("pipeline", "tune") or isinstance(
            failed.cause, OSError
        )
        say_error(f"error: {failed}" if own else f"error: {failed}\n{failed.__cause__}")
        return 1
    if "report" in summary:
        summary["report"] = _copy_report(run)
    show_summary(summary, make_console())
    if options.summary_json:
        Path(options.summary_json).write_text(json.dumps(summary, indent=1) + "\n")
    if unsent := summary["mlflow"]["unsent"]:
        say_error(f"error: {unsent}")
    return 1 if unsent else 0


def execute(preset: str, options: Options, run: Run[PipelineConfig]) -> dict[str, Any]:
    """Runs the tasks that are not done; returns the summary.

    Raises:
        ValueError: if the storage cannot be used, the tracking server does not answer or the cluster is too small.
        TaskFailed, Stopped, LeaseLost: as `run_tasks` and `Lease.check`.
    """
    config, storage, tasks = run.config, run.storage, run.until(options.until)
    with Progress(config) as progress, contextlib.ExitStack() as held:
        try:
            keys = _keys_to_hold(run, tasks, options.force)
            lease = Lease(storage, keys, _Follow(run, tasks, progress))
            if keys:
                run.record_keys()  # before the claim, whose inputs `clean` looks up there
                held.enter_context(lease)
            if options.force:
                run.forget(run.following(options.force))
            # Read with the lease held, since another driver may have done, begun or forgotten tasks meanwhile.
            manifests = _done(run, tasks)
            identity = run.identity()
            left_over = has_waiting(storage, identity)
        except OSError as error:
            raise ValueError(f"storage = {config.storage!r} cannot be read and written: {error}") from error
        cached = set(manifests)
        progress.cached(manifests)
        if len(cached) == len(tasks) and not left_over:
            return summarize(preset, config, manifests, cached)
        # Imported below, since a run whose tasks are all done needs neither a cluster nor MLflow.
        if len(cached) == len(tasks):
            return summarize(preset, config, manifests, cached, *_send_left_over(preset, config, identity, progress))
        try:
            check_server(config.tracking_uri)
        except ValueError as error:
            if not left_over:
                raise
            progress.say(escape(f"records wait in {storage.absolute('tracking')}: {error}"))
        from pipeline.driver.resources import check_machine, connect

        check_machine(config)  # before what takes longer: the import of MLflow, and the artifact store
        if "train" not in manifests:
            check_initial_model(config)
        if any(task.name == "register" for task in tasks) and "register" not in manifests:
            from pipeline.tracking.artifacts import check_artifacts

            check_artifacts(config.tracking_uri, config.tracking.experiment, config.artifact_location)
        if connect(config, storage, progress.say):
            outlive_terminal(progress)
        from pipeline.driver.run_log import RunLog

        signals = StopOnSignal(signal.SIGTERM, signal.SIGINT)
        log = RunLog(config, identity, preset, progress.say)
        log.done_before(manifests)
        observers = (progress, log, _Release(lease))
        try:
            with signals, log:
                manifests = run_tasks(run, tasks, signals, observers, lease.check, progress.say)
        except (Stopped, TaskFailed):
            if log.unsent:
                say_error(f"warning: {log.unsent}")
            raise
        return summarize(preset, config, manifests, cached, log.run_id, log.unsent)


def _copy_report(run: Run[PipelineConfig]) -> str:
    """Copies the report of a finished run to where that of the newest command lies; returns where to look for it.

    The run is done without the copy too. Then the report of an earlier command may be there, which is not named.
    """
    own = run.storage.read_json(run.manifest_path("report"))["output"]["report"]
    try:
        run.storage.write_bytes(NEWEST_REPORT, run.storage.read_verified(own))
    except (OSError, CorruptFileError) as error:
        say_error(f"warning: the report is not copied to {run.storage.absolute(NEWEST_REPORT)}: {error}")
        return mask(run.storage.absolute(own["path"]))
    return mask(run.storage.absolute(NEWEST_REPORT))


def _done(run: Run[PipelineConfig], tasks: Tasks) -> dict[str, Manifest]:
    """Manifests of those of `tasks` that need not run."""
    wanted = {task.name for task in tasks}
    return {name: manifest for name, manifest in run.done().items() if name in wanted}


def _keys_to_hold(run: Run[PipelineConfig], tasks: Tasks, forced: Sequence[str]) -> list[str]:
    """Keys of the run, and of its tasks that other runs may share and that keep a state; none if all is done.

    Those of forgotten tasks are among them, also if they are not to run now: their states are deleted.
    """
    forgotten = run.following(forced)
    finished = _done(run, tasks).keys() - forgotten
    if len(finished) == len(tasks) and not forgotten and not has_waiting(run.storage, run.identity()):
        return []
    held = ({task.name for task in tasks} - finished) | forgotten
    return [run.key, *(run.keys[task.name] for task in run.tasks if task.keeps_state and task.name in held)]


def _send_left_over(
    preset: str, config: PipelineConfig, identity: str, progress: Progress
) -> tuple[str | None, Unsent | None]:
    """Sends the records that an earlier driver of a finished run could not send; returns the run's id and the rest."""
    from pipeline.driver.run_log import flush, open_sender

    progress.say("sending records that the tracking server has not had")
    sender = open_sender(config, identity, preset)
    unsent = flush(sender, progress.say)
    return sender.run_id, unsent


class _Follow:
    """Shows the progress of another driver while this one waits for it."""

    def __init__(self, run: Run[PipelineConfig], tasks: Tasks, progress: Progress) -> None:
        self._run, self._tasks, self._progress = run, tasks, progress
        self._task_of = {key: name for name, key in run.keys.items()}
        self._shown: tuple[str, str, int] | None = None
        self._known: set[str] = set()

    def __call__(self, key: str, claim: Claim) -> None:
        manifests = _done(self._run, self._tasks)
        if self._shown != (key, claim.host, claim.pid):
            self._shown, self._known = (key, claim.host, claim.pid), set(manifests)
            what = "this run" if key == self._run.key else f"the same {self._task_of[key]} for another run"
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

    def reported(self, event: object) -> None:
        pass

    def done(self, task: str, manifest: Mapping[str, Any]) -> None:
        if task != TASKS[-1].name:  # the key of the last task stands for the run
            self._lease.release(manifest["key"])
