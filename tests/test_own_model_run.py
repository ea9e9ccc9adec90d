"""A run of a model of one's own: what it does before the first task, and what it does when the model's file changes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import ray

import pipeline.driver.resources
import pipeline.own_model
import pipeline.workflow.lease
from pipeline.own_model import OwnModel, train_own_model
from pipeline.settings.command_line import parse
from pipeline.settings.config import PipelineConfig
from pipeline.storage import Storage
from pipeline.tasks.new_process import VARIABLE, call_in_new_process, new_call_id
from pipeline.tasks.own_model import own_model_tasks
from pipeline.workers.ray_internals import POLL_SECONDS_VARIABLE
from pipeline.workflow.run import Run, recorded_keys

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Ended(Exception):
    pass


def end(*_: Any) -> NoReturn:
    raise Ended


def never_built(**_: Any) -> Any: ...


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """Of a run in this process, where Ray, which is imported, would not start any more with another environment."""
    monkeypatch.setattr(pipeline.own_model, "set_environment", lambda: None)
    return parse(["quickstart", "--search.num-trials", "0", "--storage", str(tmp_path / "runs")])[1].config


def test_the_keys_are_recorded_before_the_run_is_claimed(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`clean` looks there for the inputs of a claimed run, which it would delete otherwise."""
    monkeypatch.setattr(pipeline.workflow.lease, "Lease", end)
    model, storage = OwnModel(never_built), Storage(config.storage)
    with pytest.raises(Ended):
        train_own_model(config, model)
    run = Run(own_model_tasks(model), config, storage)
    assert recorded_keys(storage) == {run.key: run.keys}


@pytest.mark.parametrize("joined", [True, False])
def test_on_a_cluster_that_stays_the_run_outlives_its_terminal(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    """And the program ends with its terminal again when the run is over."""
    handlers = []

    def look(*_: Any) -> NoReturn:
        handlers.append(signal.getsignal(signal.SIGHUP))
        raise Ended

    monkeypatch.setattr(pipeline.driver.resources, "connect", lambda *_: joined)
    monkeypatch.setattr(pipeline.own_model, "_check_workers_have", look)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(Ended):
            train_own_model(config, OwnModel(never_built))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert callable(handlers[0]) == joined


@pytest.mark.usefixtures("ray_cluster")
def test_a_new_call_gets_a_process_that_nobody_has_used() -> None:
    def look() -> tuple[int, str | None, bool]:
        was_used = hasattr(sys, "was_used")
        sys.was_used = True  # type: ignore[attr-defined]
        return os.getpid(), os.environ.get(VARIABLE), was_used

    def fail() -> NoReturn:
        raise LookupError("no such thing")

    @ray.remote(num_cpus=0)
    def task(call_id: str, function: Any) -> Any:
        return call_in_new_process(call_id, function)

    call_ids = [new_call_id(), new_call_id()]
    found = [ray.get(task.remote(call_id, look)) for call_id in call_ids]
    assert [(call_id, was_used) for _, call_id, was_used in found] == [(call_id, False) for call_id in call_ids]
    assert found[0][0] != found[1][0]
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(task.remote(call_ids[0], fail))
    assert type(raised.value.cause) is LookupError, "the error itself, as of a function that is called here"


def output_of(script: Path, code: str) -> str:
    """What a script prints that runs in its folder, on the cluster of the tests, until it ends well."""
    script.write_text(code)
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, POLL_SECONDS_VARIABLE: "0.5"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=script.parent,
        env=os.environ | cluster,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


NET = """
WIDTH = {width}

def {name}(image_shape, num_classes, **statistics):
    import keras

    images = keras.Input(image_shape, dtype="uint8")
    hidden = keras.layers.Dense(WIDTH)(keras.layers.Flatten()(images))
    return keras.Model(images, keras.layers.Dense(num_classes)(hidden))
"""
NOTEBOOK = """
import importlib, sys
from pathlib import Path

FILE = Path(__file__).with_name("of_notebook.py")
NET = {NET!r}
sys.dont_write_bytecode = True

def write(width, name="build"):
    FILE.write_text(NET.format(width=width, name=name))

write(3)
import of_notebook
from pipeline.driver.progress import Progress
from pipeline.own_model import OwnModel, train_own_model
from pipeline.settings.command_line import parse
from pipeline.workflow.task import TaskFailed

options = ["quickstart", "--train.epochs", "1", "--train.num-workers", "1", "--search.num-trials", "0"]
config = parse([*options, "--storage", "runs"])[1].config
first = train_own_model(config, OwnModel(of_notebook.build))["evaluate"]["parameters"]
write(4, "built")
importlib.reload(of_notebook)
second = train_own_model(config, OwnModel(of_notebook.built))["evaluate"]["parameters"]
print("parameters", first, second)

started = Progress.started

def edit(self, task):
    started(self, task)
    if task == "train":
        write(6, "built")

Progress.started = edit
write(5, "built")
importlib.reload(of_notebook)
try:
    train_own_model(config, OwnModel(of_notebook.built))
except TaskFailed as failed:
    print("failed", failed)
"""


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_file_that_is_edited_between_or_within_runs_of_a_notebook(tmp_path: Path) -> None:
    """Ray uses the processes of the first run again, in which the module is as it was then."""
    said = output_of(tmp_path / "notebook.py", NOTEBOOK.format(NET=NET))
    parameters = [64 * width + width + width * 10 + 10 for width in (3, 4)]
    assert f"parameters {parameters[0]} {parameters[1]}" in said
    message = f"failed train: {tmp_path}/of_notebook.py has changed since this run began: undo the change"
    assert message in said
    assert said.count("epoch 1/1: ") == 2


ALONE = """
import json, os

from pipeline.own_model import OwnModel, train_own_model
from pipeline.settings.command_line import parse
from pipeline.workflow.task import TaskFailed

def build(image_shape, num_classes, **statistics):
    import keras

    if json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index") == 1:
        raise OSError("no such file on this host")
    images = keras.Input(image_shape, dtype="uint8")
    return keras.Model(images, keras.layers.Dense(num_classes)(keras.layers.Flatten()(images)))

options = ["quickstart", "--train.epochs", "1", "--train.num-workers", "2", "--search.num-trials", "0"]
try:
    train_own_model(parse([*options, "--storage", "runs"])[1].config, OwnModel(build))
except TaskFailed as failed:
    print("failed", failed)
"""


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_the_others_do_not_wait_for_a_worker_that_cannot_build_the_model(tmp_path: Path) -> None:
    said = output_of(tmp_path / "alone.py", ALONE)
    assert "failed train: the builder build failed: OSError: no such file on this host" in said
