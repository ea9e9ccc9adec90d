"""Trains and evaluates a Keras model of one's own as the pipeline does a Perceiver; docs/own_model.md.

`examples/own_model.py` is a script that does. Registration, the report, tracking and the search are for Perceivers
only. Ray and TensorFlow are imported when a training begins.
"""

import contextlib
import inspect
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.command import run_command, say_error, set_environment
from pipeline.settings.command_line import Options, parse
from pipeline.settings.config import PipelineConfig
from pipeline.training.own_model import OwnModel, SealedBuilder

if TYPE_CHECKING:
    from pipeline.workflow.lease import Claim

__all__ = ["OwnModel", "own_model_command", "train_own_model"]

_UNUSED = ("--model.", "--search.", "--tracking.", "--promotion.")
"""How options begin that change nothing here."""


def own_model_command(model: OwnModel, args: Sequence[str]) -> int:
    """What a script does: trains `model` with a preset and options of `pipeline/run.py`, and prints its figures.

    Args:
        model: The model.
        args: Arguments of the command line: a preset and settings. Those of the Perceiver, the search, the tracking and
            the promotion change nothing, and are named on standard error.

    Returns:
        The exit code: 0 done; 1 a task failed or another process took over; 2 a setting or the data cannot be used;
        128 + n stopped by signal n, and can be continued.
    """

    def run() -> int:
        _, options = parse([*args, "--search.num-trials", "0"])
        if unused := [arg.partition("=")[0] for arg in args if arg.startswith(_UNUSED)]:
            say_error(f"warning: a model of one's own does not use {', '.join(unused)}: leave it out")
        plain = Options()
        for name in ("dry_run", "until", "force", "summary_json"):
            if getattr(options, name) != getattr(plain, name):
                raise ValueError(f"--{name.replace('_', '-')} is for pipeline/run.py alone: leave it out")
        from pipeline.workflow.lease import LeaseLost
        from pipeline.workflow.task import Stopped, TaskFailed

        try:
            found = train_own_model(options.config, model)["evaluate"]
        except Stopped as stopped:
            say_error("stopped; the same command goes on from here")
            return 128 + stopped.signal
        except (LeaseLost, TaskFailed) as failed:
            say_error(f"error: {failed}")
            return 1
        macs = found["macs_per_image"]
        cost = "unknown multiply-accumulates" if macs is None else f"{macs / 1e6:.2f} MMAC"
        print(f"{found['parameters']:,} parameters, {cost} an image")
        print(f"validation top-1 {found['validation']['top1']:.1%}, test top-1 {found['top1']:.1%}")
        return 0

    return run_command(run)


def train_own_model(config: PipelineConfig, model: OwnModel) -> dict[str, Any]:
    """Runs the tasks `ingest`, `preprocess`, `train` and `evaluate` with a model of one's own; prints their progress.

    A run that was cut off continues when it is called again with the same arguments, and what is done is not done
    again. Ray is joined or started, and stays.

    Args:
        config: Settings of a run; those of the Perceiver, the tracking and the promotion are not used.
        model: The model.

    Returns:
        `train`, as `pipeline.workers.train.train` returns it, with the storage path and digest of `model`, a `.keras`
        file; and `evaluate`: `top1`, `top5`, `loss` and more on the test rows, `validation`, `calibration`,
        `parameters`, `macs_per_image` (None if unknown), and the paths of all results (docs/evaluation.md).

    Raises:
        ValueError: if the search is on or initial weights are given, if the model has no key, if Ray's workers cannot
            import what builds it, or if a setting or the data cannot be used.
        TaskFailed: if a task failed; its message says why.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint.
        LeaseLost: if another process has taken over.
    """
    if config.search.num_trials:
        raise ValueError(f"search.num_trials = {config.search.num_trials}: only Perceivers are searched, give 0")
    if config.train.initial_model:
        raise ValueError(f"train.initial_model = {config.train.initial_model} is a Perceiver: leave it out")
    set_environment()  # before Ray is imported
    from rich.markup import escape

    from pipeline.driver.hang_up import outlive_terminal
    from pipeline.driver.progress import Progress
    from pipeline.driver.resources import connect
    from pipeline.driver.window import check_window
    from pipeline.storage import open_storage
    from pipeline.tasks.new_process import new_call_id
    from pipeline.tasks.own_model import own_model_tasks
    from pipeline.workflow.lease import Lease
    from pipeline.workflow.run import Run
    from pipeline.workflow.runner import StopOnSignal, run_tasks
    from pipeline.workflow.task import TaskFailed

    check_window(config)
    call_id = new_call_id()
    run = Run(own_model_tasks(model, call_id), config, open_storage(config.storage))
    told: set[tuple[str, int]] = set()
    with Progress(config) as progress, contextlib.ExitStack() as ended:

        def waiting(key: str, claim: "Claim") -> None:
            if (claim.host, claim.pid) not in told:
                told.add((claim.host, claim.pid))
                progress.say(f"process {claim.pid} on {escape(claim.host)} works at this: waiting for it")

        manifests = run.done()
        if len(manifests) < len(run.tasks):
            run.record_keys()  # before the claim, whose inputs `clean` looks up there
            with Lease(run.storage, [run.key, run.keys["train"]], waiting) as lease:
                manifests = run.done()  # another process may have done some meanwhile
                progress.cached(manifests)
                if connect(config, run.storage, progress.say):
                    ended.callback(outlive_terminal(progress))
                _check_workers_have(model, call_id, progress.say)
                with StopOnSignal(signal.SIGTERM, signal.SIGINT) as stop:
                    try:
                        manifests = run_tasks(run, run.tasks, stop, [progress], lease.check, progress.say)
                    except TaskFailed as failed:
                        if isinstance(failed.cause, ValueError):
                            raise failed.cause from failed
                        raise
        else:
            progress.cached(manifests)
    return {name: manifests[name]["output"] for name in ("train", "evaluate")}


def _check_workers_have(model: OwnModel, call_id: str, say: Callable[[str], None] = lambda text: None) -> None:
    """Raises a ValueError if what builds `model` cannot be sent to Ray's workers, is not there, or is another there."""
    from pipeline.tasks.own_model import sealed
    from pipeline.workflow.nodes import ask_every_node

    key = model.key()
    for node, reason in ask_every_node(_why_not_loaded_anew, call_id, sealed(model, key), say=say):
        if reason:
            raise ValueError(
                f"the builder {model.name} of the module {model.builder.__module__} cannot be imported by Ray's "
                f"workers on {node}: {reason}: put its file, or its whole package, into the folder of the script, and "
                "all that into the same folder on every node; or install it on every node, or name its folder in "
                "PYTHONPATH before Ray starts"
            )


def _why_not_loaded_anew(call_id: str, model: OwnModel) -> str:
    from pipeline.tasks.new_process import call_in_new_process

    return str(call_in_new_process(call_id, why_not_loaded, model))


def why_not_loaded(model: OwnModel) -> str:
    """Why this process cannot load a sealed model: its module is not here or fails, or is not that of its key.

    Empty if it can.
    """
    builder = model.builder
    assert isinstance(builder, SealedBuilder), "only what is sealed is sent to workers"
    try:
        opened = replace(model, builder=builder.open())
    except (ImportError, AttributeError) as error:
        return str(error)
    except (Exception, SystemExit) as error:  # the module itself runs, as one that reads a file or a command line
        return f"it ends with {type(error).__name__}: {error}"
    if not opened.change_of(builder.key):
        return ""
    what = "another file is" if "package" not in builder.key else "another file, or another one of its package, is"
    return f"{what} found there, {inspect.getsourcefile(opened.builder)}"
