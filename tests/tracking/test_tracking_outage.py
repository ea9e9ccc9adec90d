"""Kills a tracking server during a training and starts it again: no epoch takes longer, and no metric is lost.

    python -m pytest -m slow -s tests/tracking/test_tracking_outage.py

prints the epoch times. $OUTAGE_SECONDS (default 20) sets how long the server is away.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tracking_server import TrackingServer

from pipeline.storage import Storage

ROOT = Path(__file__).parents[2]
OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "20"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    made = TrackingServer(tmp_path)
    yield made
    made.kill()


class Driver:
    """A running `python pipeline/run.py quickstart` without a search, and its output."""

    def __init__(self, folder: Path, uri: str, *options: str) -> None:
        self._log, self.summary_path = folder / f"driver-{time.monotonic_ns()}.log", folder / "summary.json"
        command = [sys.executable, "pipeline/run.py", "quickstart", "--storage", str(folder / "runs")]
        command += ["--tracking.uri", uri, "--search.num-trials", "0", "--summary-json", str(self.summary_path)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def epochs(self) -> int:
        return len(re.findall(r"train +epoch \d+/\d+: ", self.output))

    def wait_for_epoch(self, epoch: int) -> None:
        deadline = time.monotonic() + 600
        while self.epochs < epoch:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(600)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


def runs_of(uri: str) -> dict[str, Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("perceiver")
    assert experiment is not None
    found = list(client.search_runs([experiment.experiment_id]))
    runs = {str(run.info.run_name): run for run in found}
    assert len(runs) == len(found), "a run was created twice"
    return runs


def check_history(uri: str, epochs: int) -> None:
    """Asserts that every metric of the training has one point per epoch, in order."""
    client, train = MlflowClient(uri), runs_of(uri)["train"]
    of_epochs = [key for key in train.data.metrics if key.startswith("val_") or key in ("loss", "accuracy", "step_ms")]
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(of_epochs)
    for key in of_epochs:
        history = client.get_metric_history(train.info.run_id, key)
        assert [metric.step for metric in history] == list(range(1, epochs + 1)), key
        assert [metric.timestamp for metric in history] == sorted(metric.timestamp for metric in history)


@pytest.mark.slow
def test_an_outage_costs_neither_time_nor_metrics(server: TrackingServer, tmp_path: Path) -> None:
    epochs = int(80 + 2.5 * OUTAGE_SECONDS)
    options = ["--train.epochs", str(epochs), "--train.early-stopping-patience", str(epochs), "--until", "train"]
    driver = Driver(tmp_path, server.uri, *options)
    try:
        driver.wait_for_epoch(20)
        server.kill()
        killed_at = driver.epochs
        time.sleep(OUTAGE_SECONDS)
        back_at = driver.epochs
        waiting = len(list((tmp_path / "runs" / "tracking").glob("*/*.json")))
        assert back_at < epochs, "the training ended before the server was back: set more epochs"
        server.start()
        assert driver.wait() == 0, driver.output
    finally:
        driver.end()
    (manifest,) = (tmp_path / "runs" / "tasks" / "train").glob("*/manifest.json")
    seconds = [epoch["seconds"] for epoch in json.loads(manifest.read_text())["output"]["history"]]
    up, down = seconds[5 : killed_at - 1], seconds[killed_at + 1 : back_at - 1]
    print(
        f"\n{OUTAGE_SECONDS:.0f} s without a server, epochs {killed_at} to {back_at} of {epochs}, {waiting} records "
        f"waiting. Seconds of an epoch, median and quartiles: with the server {_spread(up)}, without {_spread(down)}"
    )
    assert waiting >= back_at - killed_at - 1
    assert statistics.median(down) < statistics.median(up) * 1.2
    check_history(server.uri, epochs)
    assert {run.info.status for run in runs_of(server.uri).values()} == {"FINISHED"}
    assert not list((tmp_path / "runs" / "tracking").glob("*/*"))


@pytest.mark.slow
def test_the_same_command_sends_what_a_dead_server_missed(server: TrackingServer, tmp_path: Path) -> None:
    options = ["--train.epochs", "6", "--until", "train"]
    driver = Driver(tmp_path, server.uri, *options)
    try:
        driver.wait_for_epoch(2)
        server.kill()
        assert driver.wait() == 1
    finally:
        driver.end()
    (folder,) = (tmp_path / "runs" / "tracking").iterdir()
    assert re.search(rf"error: \d+ records have not reached the tracking server; they lie in {folder}", driver.output)
    assert "the same command sends them" in driver.output
    assert json.loads(driver.summary_path.read_text())["train"]["epochs"] == 6
    again = Driver(tmp_path, server.uri, *options)
    assert again.wait() == 1, "the server is still away"
    server.start()
    last = Driver(tmp_path, server.uri, *options)
    assert last.wait() == 0, last.output
    assert "sending records" in last.output
    check_history(server.uri, 6)
    assert {run.info.status for run in runs_of(server.uri).values()} == {"FINISHED"}
    assert Storage(str(folder)).list("") == []


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
