"""Runs in real SQLite stores, also from several processes."""

import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.errors import TrackingUnavailable, retry_transient
from pipeline.tracking.tracker import Tracker

PROJECT = Path(__file__).parents[2]
SHA256 = "0123456789abcdef" * 4


@pytest.fixture(scope="module", autouse=True)
def hostile_environment() -> Iterator[None]:
    """Environment variables that must have no effect: nothing listens at the URI, and the run does not exist."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_RUN_ID", "0" * 32)
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
        patch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
        yield


def open_tracker(folder: Path) -> Tracker:
    return Tracker(f"sqlite:///{folder}/mlflow.db", "shapes", f"{folder}/mlartifacts")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return open_tracker(tmp_path_factory.mktemp("store"))


def run_python(code: str, *arguments: object, cwd: Path, isolated: bool = False) -> subprocess.Popen:
    flags = ["-I"] if isolated else []
    command = [sys.executable, *flags, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True)


def test_repeated_calls_add_nothing(tracker: Tracker) -> None:
    history = [{"epoch": 1, "loss": 2.0, "timestamp": 1e9}, {"epoch": 2, "loss": 1.5, "val/top1": 0.5}]
    for number in range(3):
        # The last time with a new tracker, which has no cache, as after a crash.
        again = tracker if number < 2 else Tracker(tracker.client.tracking_uri, "shapes")
        run_id = again.find_or_create_run("train", "repeated")
        again.log_params(run_id, {f"section.field_{i}": i for i in range(150)})
        again.log_history(run_id, history)
        again.log_metrics(run_id, {"test/top1": 0.75, "test/loss": math.nan})
        again.log_dataset(run_id, "shapes", SHA256, "/data/shapes", "training", {"rows": 10})
    assert len(tracker.client.search_runs([tracker.experiment_id], "tags.`pipeline.identity` = 'repeated'")) == 1
    run = tracker.client.get_run(run_id)
    assert len(run.data.params) == 150
    assert [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "loss")] == [(1, 2.0), (2, 1.5)]
    assert tracker.client.get_metric_history(run_id, "loss")[0].timestamp == 1_000_000_000_000
    assert [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "val/top1")] == [(2, 0.5)]
    assert [m.value for m in tracker.client.get_metric_history(run_id, "test/top1")] == [0.75]
    assert len(tracker.client.get_metric_history(run_id, "test/loss")) == 1
    assert math.isnan(run.data.metrics["test/loss"])
    assert run.inputs
    (dataset_input,) = run.inputs.dataset_inputs
    assert dataset_input.dataset.digest == SHA256[:36]
    assert dataset_input.dataset.profile == '{"rows": 10}'
    assert {tag.key: tag.value for tag in dataset_input.tags} == {"mlflow.data.context": "training", "sha256": SHA256}
    assert run.data.tags["dataset.sha256"] == SHA256


def test_the_experiment_opens_in_the_view_of_model_training(tmp_path: Path) -> None:
    kind = "mlflow.experimentKind"  # what the pages of `mlflow ui` look at
    made = open_tracker(tmp_path)
    assert made.client.get_experiment(made.experiment_id).tags[kind] == "custom_model_development"
    made.client.create_experiment("elsewhere")
    made.client.create_experiment("chosen", tags={kind: "genai_development"})
    kinds = {}
    for name in ("elsewhere", "chosen"):
        opened = Tracker(made.client.tracking_uri, name)
        kinds[name] = opened.client.get_experiment(opened.experiment_id).tags[kind]
    assert kinds == {"elsewhere": "custom_model_development", "chosen": "genai_development"}


def test_a_longer_history_adds_only_what_is_new(tracker: Tracker) -> None:
    run_id = tracker.find_or_create_run("train", "growing")
    history = [{"epoch": epoch, "loss": 1 / epoch, "lr": math.inf} for epoch in range(1, 1201)]
    for length in (1, 2, 1200):
        tracker.log_history(run_id, history[:length])
    logged = tracker.client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in logged] == [(row["epoch"], row["loss"]) for row in history]
    assert tracker.client.get_metric_history(run_id, "lr")[0].value > 1e308


def test_an_epoch_that_was_trained_again_has_its_last_value(tracker: Tracker) -> None:
    """As after a kill and a start on another number of workers, which rounds in another order."""
    first = {"epoch": 1, "loss": 2.0, "none": math.nan, "high": math.inf, "timestamp": 1e9}
    second = first | {"epoch": 2, "loss": 1.5, "timestamp": 1e9 + 1}
    again = second | {"loss": 1.25, "timestamp": 1e9 + 9}
    set_back = second | {"loss": 1.0, "timestamp": 1e9 - 7200}
    run_id = tracker.find_or_create_run("train", "again")

    def points(key: str) -> list[tuple[int, float]]:
        found = sorted(tracker.client.get_metric_history(run_id, key), key=lambda metric: metric.timestamp)
        return [(metric.step, metric.value) for metric in found]

    for number in range(2):
        # The second time with a new tracker and one record more that was sent before, as after a crash.
        other = tracker if number == 0 else Tracker(tracker.client.tracking_uri, "shapes")
        other.log_history(run_id, [first, second])
        for rows in ([again], [first, second] * number, [again | {"timestamp": 2e9}], [first, again] * number):
            other.log_history(run_id, rows)
        assert points("loss") == [(1, 2.0), (2, 1.5), (2, 1.25)]
    assert tracker.client.get_run(run_id).data.metrics["loss"] == 1.25
    for _ in range(2):
        tracker.log_history(run_id, [set_back])  # the clock was set back
    assert points("loss") == [(1, 2.0), (2, 1.5), (2, 1.25), (2, 1.0)]
    assert tracker.client.get_run(run_id).data.metrics["loss"] == 1.0
    assert (len(points("none")), len(points("high"))) == (2, 2), "values that are the same are logged once"


def test_a_changed_parameter_becomes_a_tag(tracker: Tracker) -> None:
    run_id = tracker.find_or_create_run("train", "changing")
    tracker.log_params(run_id, {"train.num_workers": 2, "text": "x" * 10_000})
    tracker.log_params(run_id, {"train.num_workers": 1, "text": "x" * 10_000})
    tracker.log_metrics(run_id, {"top1": 0.5})
    tracker.log_metrics(run_id, {"top1": 0.6})
    data = tracker.client.get_run(run_id).data
    assert data.params["train.num_workers"] == "2"
    assert {key: tag for key, tag in data.tags.items() if key.startswith("changed.")} == {
        "changed.train.num_workers": "1"
    }
    assert len(data.params["text"]) == 6000
    assert data.metrics["top1"] == 0.6


def test_runs_form_a_tree_and_can_be_reopened(tracker: Tracker) -> None:
    pipeline = tracker.find_or_create_run("pipeline", "tree")
    search = tracker.find_or_create_run("search", "tree/search", pipeline)
    trial = tracker.find_or_create_run("trial 0", "tree/search/0", search)
    tracker.finish(pipeline, "KILLED")
    assert tracker.find_or_create_run("another name", "tree") == pipeline
    assert tracker.find_run("tree/search/0") == trial
    assert tracker.find_run("tree/train") is None
    runs = [tracker.client.get_run(run_id) for run_id in (pipeline, search, trial)]
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs] == [None, pipeline, search]
    assert [run.info.run_name for run in runs] == ["pipeline", "search", "trial 0"]
    assert [run.info.status for run in runs] == ["RUNNING"] * 3
    tracker.finish(trial)
    assert tracker.client.get_run(trial).info.status == "FINISHED"


def test_artifacts_are_written_only_to_the_artifact_location(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = tracker.find_or_create_run("evaluate", "files")
    (tmp_path / "plot.svg").write_text("<svg/>")
    tracker.log_file(run_id, tmp_path / "plot.svg", "plots")
    tracker.log_text(run_id, "hello", "note.txt")
    folder = Path(tracker.client.get_experiment(tracker.experiment_id).artifact_location) / run_id / "artifacts"
    assert {os.fspath(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        "plots/plot.svg",
        "note.txt",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["plot.svg"]


def test_a_deleted_experiment_is_refused(tracker: Tracker) -> None:
    deleted = Tracker(tracker.client.tracking_uri, "deleted")
    deleted.client.delete_experiment(deleted.experiment_id)
    with pytest.raises(ValueError, match=r"tracking\.experiment = 'deleted' was deleted"):
        Tracker(tracker.client.tracking_uri, "deleted")


def test_two_processes_at_once_create_one_run(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from pipeline.tracking.tracker import Tracker
        folder, number = Path(sys.argv[1]), sys.argv[2]
        (folder / f"ready{number}").touch()
        while len(list(folder.glob("ready*"))) < 2:
            time.sleep(0.001)
        tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "shapes", f"{folder}/mlartifacts")
        print(*(tracker.find_or_create_run("train", f"identity {i}") for i in range(20)))
    """
    processes = [run_python(code, tmp_path, number, cwd=PROJECT) for number in range(2)]
    first, second = (process.communicate(timeout=600)[0].split() for process in processes)
    assert len(set(first)) == 20
    assert first == second
    tracker = open_tracker(tmp_path)
    assert sorted(run.info.run_id for run in tracker.client.search_runs([tracker.experiment_id])) == sorted(first)


def test_a_dead_server_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow by default retries for four minutes."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(Exception, match="Max retries exceeded"):
        Tracker("http://127.0.0.1:9", "shapes")
    assert time.monotonic() - start < 5


def test_transient_errors_are_retried_for_the_given_time(tracker: Tracker) -> None:
    calls = []

    def call() -> str:
        calls.append(time.monotonic())
        if len(calls) < 2:
            raise ConnectionError("refused")
        return tracker.existing_run("patience")

    with pytest.raises(
        TrackingUnavailable, match=r"sqlite:.* has not answered for 1 s.*patience has not been recorded"
    ):
        retry_transient(call, tracker.client.tracking_uri, 1)
    run_id = tracker.find_or_create_run("train", "patience")
    assert retry_transient(call, tracker.client.tracking_uri, 0) == run_id
    with pytest.raises(Exception, match="NONSENSE"):  # refused, so not retried
        retry_transient(lambda: tracker.finish(run_id, "NONSENSE"), "uri", 600)


def test_infinite_values_are_logged_once_too(tracker: Tracker) -> None:
    """A database keeps the largest number for them."""
    run_id = tracker.find_or_create_run("infinite", "infinite")
    values = {"high": math.inf, "low": -math.inf, "none": math.nan, "large": 1e308}
    for _ in range(2):
        tracker.log_metrics(run_id, values)
    assert [len(tracker.client.get_metric_history(run_id, key)) for key in values] == [1, 1, 1, 1]


def test_the_last_value_is_shown_although_the_clock_was_set_back(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, now = tracker.find_or_create_run("clock", "clock"), time.time()
    tracker.log_metrics(run_id, {"seconds": 1.0})
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    for _ in range(2):
        tracker.log_metrics(run_id, {"seconds": 2.0})
    assert tracker.client.get_run(run_id).data.metrics == {"seconds": 2.0}
    assert len(tracker.client.get_metric_history(run_id, "seconds")) == 2


def test_a_name_that_is_no_text_is_written_out(tracker: Tracker) -> None:
    """Names of files may have any bytes; a database takes UTF-8, and PostgreSQL no zeros."""
    run_id, name = tracker.find_or_create_run("names", "names"), "a\udcffb\0"
    tracker.set_tags(run_id, {"command": name})
    tracker.log_params(run_id, {"path": name})
    tracker.log_params(run_id, {"path": name})
    tracker.log_text(run_id, name, "command.txt")
    tracker.log_dataset(run_id, "data", SHA256, name, "training")
    data = tracker.client.get_run(run_id).data
    assert (data.tags["command"], data.params["path"]) == ("a\\udcffb\\x00", "a\\udcffb\\x00")
    assert "changed.path" not in data.tags
