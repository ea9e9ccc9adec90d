"""The events of a run that are recorded, in a real SQLite store."""

import http.server
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.driver import run_log
from pipeline.driver.run_log import RunLog
from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tracking.outbox import has_waiting
from pipeline.training.worker import EpochEnded, StepProgress
from pipeline.workflow.lease import LeaseLost
from pipeline.workflow.task import Stopped


def statuses(config: PipelineConfig) -> dict[str | None, str]:
    """Status of each run of the experiment, by its name."""
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}


def test_epochs_are_recorded_and_steps_are_not(tmp_path: Path) -> None:
    config = replace(quickstart(), storage=str(tmp_path))
    with RunLog(config, "identity", "quickstart") as log:
        log.reported(StepProgress(1, 3, steps=20, images_per_second=450.0, loss=2.5, accuracy=0.1))
        log.reported(EpochEnded({"epoch": 1, "loss": 2.0, "mfu": 0.25}))
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["quickstart", "train"]
    assert runs["train"].data.metrics.items() >= {"loss": 2.0, "mfu": 0.25}.items()


def test_what_a_dead_server_would_get_waits_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "FLUSH_SECONDS_OF_A_STOP", run_log.QUIET_SECONDS)
    config = replace(quickstart(), storage=str(tmp_path))
    config = replace(config, tracking=replace(config.tracking, uri="http://user:hunter2hunter2@127.0.0.1:9"))
    log = RunLog(config, "identity", "quickstart")
    log.started("train")
    history = [{"epoch": 1, "loss": 2.0, "seconds": 36.0, "num_workers": 2, "images_per_second": 100.0}]
    log.reported(EpochEnded(history[0]))
    output = {"history": history, "images_per_second": 100.0}
    log.done("train", {"key": "k", "seconds": 40.0, "output": output})
    log.started("evaluate")
    with pytest.raises(Stopped), log:
        raise Stopped(15)
    assert log.run_id is None
    assert log.unsent is not None
    assert "lie in" in str(log.unsent)
    entries = [json.loads(file.read_text()) for file in sorted((tmp_path / "tracking" / "identity").glob("*.json"))]
    assert len(entries) == log.unsent.waiting
    assert "http://***@127.0.0.1:9" in json.dumps(entries), "the settings are recorded"
    assert "hunter2" not in json.dumps(entries) + str(log.unsent)
    assert [entry["run"] for entry in entries if entry["status"]] == ["train", "evaluate", ""]
    assert [entry["status"] for entry in entries if entry["status"]] == ["FINISHED", "KILLED", "KILLED"]
    (cost,) = (entry["metrics"]["core_hours"] for entry in entries if "core_hours" in entry["metrics"])
    assert cost == pytest.approx(0.02)
    timestamps = [row["timestamp"] for entry in entries for row in entry["history"] if "timestamp" in row]
    assert timestamps, "the time of an epoch is when it ended, not when the server was back"


def test_a_driver_that_has_lost_the_run_leaves_the_status_of_its_successor(tmp_path: Path) -> None:
    config = replace(quickstart(), storage=str(tmp_path))
    suspended = RunLog(config, "identity", "quickstart")
    suspended.started("train")
    deadline = time.monotonic() + 60
    while has_waiting(Storage(str(tmp_path)), "identity"):  # it has told the server all, and is suspended
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with RunLog(config, "identity", "quickstart") as successor:
        successor.started("train")
        successor.reported(EpochEnded({"epoch": 1, "loss": 2.0}))
    ended = {"quickstart": "FINISHED", "train": "FINISHED"}
    assert statuses(config) == ended
    suspended.reported(EpochEnded({"epoch": 2, "loss": 1.0}))
    with pytest.raises(LeaseLost), suspended:
        raise LeaseLost("another driver works at this run")
    assert suspended.unsent is None
    assert statuses(config) == ended


def test_a_login_that_is_refused_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheimnis")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        config = replace(quickstart(), storage=str(tmp_path))
        config = replace(config, tracking=replace(config.tracking, uri=uri))
        with pytest.raises(ValueError, match=rf"{uri}: the server refuses the login.*403.*: set MLFLOW_TRACKING_USER"):
            RunLog(config, "identity", "quickstart")
        server.shutdown()
