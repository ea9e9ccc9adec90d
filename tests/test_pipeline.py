"""The whole pipeline in real processes on the embedded digits: complete, cached, changed, stopped and killed runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.shards import read_rows
from pipeline.evaluation.metrics import softmax
from pipeline.evaluation.predictions import read_predictions
from pipeline.settings.command_line import parse
from pipeline.storage import Storage
from pipeline.tasks import graph

ROOT = Path(__file__).parents[1]
SHALLOW = ["--model.num-iterations", "1", "--model.num-self-attention-blocks", "1"]  # traced in half the time
SMALL = [*SHALLOW, "--train.epochs", "4", "--train.learning-rate", "0.004", "--search.num-trials", "2"]
SMALL += ["--search.epochs", "1"]
NO_SEARCH = [*SHALLOW, "--search.num-trials", "0"]
TASKS = [task.name for task in graph.TASKS]
# As in most companies. Nothing of a run on one machine goes through them.
PROXIES = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")


@dataclass
class Driver:
    """A process of `python pipeline/run.py quickstart`, and its output."""

    process: subprocess.Popen[str]
    log: Path
    summary_path: Path

    def wait(self, timeout: float = 600) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done in {timeout} s:\n{self.output}")

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def summary(self) -> dict[str, Any]:
        assert self.wait() == 0, self.output
        return json.loads(self.summary_path.read_text())

    def wait_for(self, text: str, timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s:\n{self.output}"
            time.sleep(0.05)


class Runs:
    """Starts drivers on one storage folder."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.storage, self._ray_folder, self._drivers = folder / "runs", ray_folder, []  # type: ignore[var-annotated]

    def start(self, *options: str) -> Driver:
        name = self.storage.parent / f"driver-{len(self._drivers)}"
        summary = name.with_suffix(".json")
        command = [sys.executable, "pipeline/run.py", "quickstart", "--storage", str(self.storage)]
        with name.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--summary-json", str(summary), *options],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"RAY_TMPDIR": str(self._ray_folder), "KERAS_BACKEND": "jax"} | PROXIES,
            )
        self._drivers.append(Driver(process, name.with_suffix(".log"), summary))
        return self._drivers[-1]

    def run(self, *options: str) -> dict[str, Any]:
        return self.start(*options).summary

    def end(self) -> None:
        for driver in self._drivers:
            driver.process.kill()
            driver.process.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Iterator[Runs]:
    """A storage folder in which one run is done. Tests must not add anything to it."""
    made = Runs(tmp_path_factory.mktemp("pipeline"), ray_folder)
    made.run(*SMALL)
    yield made
    made.end()


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Path:
    """The results of the tasks for the data."""
    made = Runs(tmp_path_factory.mktemp("preprocessed"), ray_folder)
    made.run("--until", "preprocess")
    return made.storage / "tasks"


@pytest.fixture
def new_runs(preprocessed: Path, tmp_path: Path, ray_folder: Path) -> Iterator[Runs]:
    """A storage folder in which the data are preprocessed, and nothing else is done."""
    made = Runs(tmp_path, ray_folder)
    shutil.copytree(preprocessed, made.storage / "tasks")
    yield made
    made.end()


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {name: task["state"] for name, task in summary["tasks"].items()}


def manifest(runs: Runs, task: str) -> dict[str, Any]:
    (path,) = (runs.storage / "tasks" / task).glob("*/manifest.json")
    return json.loads(path.read_text())


def runs_in_mlflow(runs: Runs) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs.storage}/mlflow.db")
    experiment = client.get_experiment_by_name("perceiver")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_the_same_command_again_does_nothing_and_is_quick(runs: Runs) -> None:
    start = time.monotonic()
    summary = runs.run(*SMALL)
    assert time.monotonic() - start < 15
    assert states(summary) == dict.fromkeys(TASKS, "cached")
    assert summary["test"]["num_examples"] == 360
    assert summary["test"]["top1"] > 0.5
    per_class = manifest(runs, "evaluate")["output"]["per_class"]
    assert summary["test"]["balanced_accuracy"] == pytest.approx(np.mean(per_class))
    assert summary["search"]["num_trials"] == 2
    assert summary["search"]["best"]["learning_rate"] == 0.004
    assert summary["train"]["num_workers"] == 2
    assert summary["model"] == {"name": "perceiver", "version": "1", "alias": "champion", "uri": "models:/perceiver/1"}


def test_runs_are_recorded_as_parent_children_and_grandchildren(runs: Runs) -> None:
    found = {run.info.run_id: run for run in runs_in_mlflow(runs)}
    summary = runs.run(*SMALL)
    parent = summary["mlflow"]["run_id"]
    assert found[parent].data.tags["dataset.sha256"] == summary["dataset"]["digest"]
    assert found[parent].data.params["train.learning_rate"] == "0.004"
    children = {run.info.run_name: run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == parent}
    assert sorted(children) == sorted(TASKS)
    trials = [
        run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == children["search"].info.run_id
    ]
    assert len(trials) == 2
    assert all("num_latents" in trial.data.params and "val_accuracy" in trial.data.metrics for trial in trials)
    assert children["train"].data.metrics["val_accuracy"] > 0.5
    assert found[parent].data.metrics["test_balanced_accuracy"] == summary["test"]["balanced_accuracy"]
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_the_registered_model_predicts_elsewhere_what_evaluate_saw(runs: Runs, tmp_path: Path) -> None:
    """In a process that cannot import this project and may not unpickle."""
    evaluated = manifest(runs, "evaluate")["output"]
    predictions = read_predictions(evaluated["predictions"]["test"], Storage(str(runs.storage)))
    shards = manifest(runs, "preprocess")["output"]["splits"]["test"]["shards"]
    rows = [read_rows(shard, Storage(str(runs.storage))) for shard in shards]
    order = np.argsort(np.concatenate([part.row_ids for part in rows]))
    images = tmp_path / "images.npy"
    np.save(images, np.concatenate([part.images for part in rows])[order])
    code = (
        "import sys, numpy as np, mlflow\n"
        f"sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        f"mlflow.set_tracking_uri('sqlite:///{runs.storage}/mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/perceiver@champion')\n"
        f"np.save({str(tmp_path / 'found.npy')!r}, model.predict(np.load({str(images)!r})))\n"
        "assert not {'perceiver', 'pipeline', 'tune'} & set(sys.modules)\n"
    )
    env = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = softmax(predictions.logits, evaluated["calibration"]["temperature"])
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-5)


def test_a_run_says_how_to_repeat_itself_and_a_version_how_it_was_made(runs: Runs) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs.storage}/mlflow.db")
    found = {run.info.run_name: run for run in runs_in_mlflow(runs)}
    parent, train = found["quickstart"], found["train"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"config.json", "hardware.json", "command.txt", "packages.txt", "report.html"} <= files
    assert "pipeline/run.py quickstart --storage" in parent.data.tags["command"]
    assert parent.data.params["train.seed"] == "0"
    hours = sum(m.value for m in client.get_metric_history(train.info.run_id, "seconds") if m.step) * 2 / 3600
    assert train.data.metrics["core_hours"] == pytest.approx(hours)
    assert manifest(runs, "train")["output"]["cpus_per_worker"] == 1, "whatever a later command says"
    assert train.data.metrics["median_images_per_second"] > 0
    assert train.data.metrics["forward_gflops_per_image"] > 0
    version = client.get_model_version("perceiver", "1")
    card = (Path(str(version.source)) / "README.md").read_text()
    digest = manifest(runs, "preprocess")["output"]["digest"]
    assert all(text in card for text in (digest, "## Limits", "CC BY 4.0", "Apache-2.0", "train.learning_rate"))
    assert str(version.description) in card
    assert version.tags["promotion.state"] == "champion"


def test_a_result_whose_registered_model_was_deleted_is_not_current(runs: Runs, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    shutil.copytree(runs.storage, tmp_path / "runs")
    config = parse(["quickstart", *SMALL, "--storage", str(tmp_path / "runs")])[1].config
    (register,) = [task for task in graph.TASKS if task.name == "register"]
    output = manifest(runs, "register")["output"] | {"tracking_uri": config.tracking_uri}
    assert register.is_current(config, output)
    MlflowClient(config.tracking_uri).delete_registered_model("perceiver")
    assert not register.is_current(config, output)


@pytest.mark.slow  # a training; the test above and tests/workflow/test_run.py cover both halves of it
def test_a_deleted_model_is_registered_again(new_runs: Runs) -> None:
    from mlflow import MlflowClient

    options = [*NO_SEARCH, "--train.epochs", "1", "--train.warmup-epochs", "0", "--until", "register"]
    assert new_runs.run(*options)["model"]["uri"] == "models:/perceiver/1"
    MlflowClient(f"sqlite:///{new_runs.storage}/mlflow.db").delete_registered_model("perceiver")
    again = new_runs.run(*options)
    assert [name for name, state in states(again).items() if state == "done"] == ["register"]
    assert again["model"]["uri"] == "models:/perceiver/1"
    assert [name for name, state in states(new_runs.run(*options)).items() if state == "done"] == []


def test_a_changed_shard_is_named_before_training(new_runs: Runs) -> None:
    shard = manifest(new_runs, "preprocess")["output"]["splits"]["train"]["shards"][3]["path"]
    path = new_runs.storage / shard
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    driver = new_runs.start(*NO_SEARCH)
    assert driver.wait() == 2
    assert str(path) in driver.output
    assert "--force" in driver.output
    assert "epoch 1" not in driver.output


def assert_trained_once(runs: Runs, epochs: int) -> None:
    """Asserts that there is one run, one training, and one record of each epoch in MLflow."""
    parents = [run for run in runs_in_mlflow(runs) if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    (train,) = [run for run in runs_in_mlflow(runs) if run.info.run_name == "train"]
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{runs.storage}/mlflow.db").get_metric_history(train.info.run_id, "val_loss")
    assert sorted(metric.step for metric in history) == list(range(1, epochs + 1))


@pytest.mark.long
def test_a_run_with_another_learning_rate_that_is_stopped_and_killed_goes_on_from_its_checkpoints(
    new_runs: Runs,
) -> None:
    """It is stopped by SIGTERM, continues, is killed, and continues on another number of workers."""
    options = [*NO_SEARCH, "--train.learning-rate", "0.002", "--train.epochs", "7"]
    options += ["--train.checkpoint-every-steps", "7", "--train.class-weights", "balanced"]
    stopped = new_runs.start(*options)
    stopped.wait_for("epoch 2/7:")
    stopped.process.terminate()
    assert stopped.wait(60) == 128 + signal.SIGTERM, stopped.output
    assert "goes on from here" in stopped.output
    killed = new_runs.start(*options)
    killed.wait_for("epoch 4/7:")
    killed.process.kill()
    assert killed.wait(60) == -signal.SIGKILL
    last = new_runs.start(*options, "--train.num-workers", "1")
    summary = last.summary

    assert "epoch 1/7" not in killed.output
    assert "epoch 2/7:" not in killed.output, "an epoch that was reported was trained again"
    assert "epoch 4/7:" not in last.output, "an epoch that was reported was trained again"
    before_train = TASKS[: TASKS.index("train")]
    assert states(summary) == dict.fromkeys(TASKS, "done") | dict.fromkeys(before_train, "cached")
    assert (summary["train"]["epochs"], summary["train"]["num_workers"]) == (7, 1)
    assert_trained_once(new_runs, 7)
    # The learning rate is another one, but the data are the same.
    assert summary["model"]["version"] == "1"
    (parent,) = [run for run in runs_in_mlflow(new_runs) if run.info.run_id == summary["mlflow"]["run_id"]]
    assert parent.data.tags["done_before.preprocess"] == summary["tasks"]["preprocess"]["key"]
    assert parent.data.tags["dataset.sha256"] == summary["dataset"]["digest"]


@pytest.mark.slow  # two more runs; the test above and test_stopping.py cover the same code with SIGTERM
def test_a_run_that_is_interrupted_goes_on_and_a_second_run_registers_a_second_version(new_runs: Runs) -> None:
    options = [*NO_SEARCH, "--train.epochs", "6"]
    interrupted = new_runs.start(*options)
    interrupted.wait_for("epoch 3/6:")
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.wait(60) == 128 + signal.SIGINT, interrupted.output
    again = new_runs.start(*options)
    assert again.summary["train"]["epochs"] == 6
    assert again.summary["model"]["version"] == "1"
    assert "epoch 3/6:" not in again.output
    assert_trained_once(new_runs, 6)
    second = new_runs.run(*options, "--train.learning-rate", "0.002", "--train.epochs", "1")
    # Without trials, the search does not depend on the learning rate.
    before_train = TASKS[: TASKS.index("train")]
    assert states(second) == dict.fromkeys(TASKS, "done") | dict.fromkeys(before_train, "cached")
    assert second["model"]["version"] == "2"
