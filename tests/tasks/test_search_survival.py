"""A search of the real pipeline whose driver is killed repeatedly: no trial is lost, repeated or duplicated."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUM_TRIALS, EPOCHS = 8, 4
COMMAND = [
    *(sys.executable, str(ROOT / "pipeline" / "run.py"), "quickstart", "--until", "search"),
    *("--search.num-trials", str(NUM_TRIALS), "--search.epochs", str(EPOCHS)),
]


def start(storage: Path, ray_folder: Path, log: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"RAY_TMPDIR": str(ray_folder)}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*COMMAND, "--storage", str(storage)], env=env, stdout=file, stderr=file, start_new_session=True
        )


def records(storage: Path) -> dict[str, dict[str, Any]]:
    paths = storage.glob("tasks/search/*/state/trials/trial-*.json")
    return {path.stem: json.loads(path.read_text()) for path in sorted(paths)}


@pytest.mark.slow
def test_three_kills_at_random_moments(tmp_path: Path, ray_folder: Path) -> None:
    storage, log, rng = tmp_path / "runs", tmp_path / "log", random.Random(0)
    ended: dict[str, dict[str, Any]] = {}
    for begun in (1, 3, 5):
        driver = start(storage, ray_folder, log)
        deadline = time.monotonic() + 600
        while len(records(storage)) < begun:
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 4))
        assert driver.poll() is None, f"the search was done before it was killed:\n{log.read_text()}"
        driver.kill()
        driver.wait()
        found = records(storage)
        assert {name: found[name] for name in ended} == ended, "a trial that had ended was run again"
        ended = {name: trial for name, trial in found.items() if trial["status"] != "running"}
    driver = start(storage, ray_folder, log)
    assert driver.wait(300) == 0, log.read_text()
    found = records(storage)
    assert list(found) == [f"trial-{number:04d}" for number in range(1, NUM_TRIALS + 1)]
    assert {name: found[name] for name in ended} == ended, "a trial that had ended was run again"
    assert all(trial["status"] in ("finished", "stopped early") for trial in found.values())
    check_mlflow(storage, found)


def check_mlflow(storage: Path, found: dict[str, dict[str, Any]]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'perceiver'")
    runs = client.search_runs([experiment.experiment_id])
    (search,) = [run for run in runs if run.info.run_name == "search"]
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == search.info.run_id]
    assert sorted(run.info.run_name for run in trials) == sorted(found)
    for run in trials:
        trial = found[run.info.run_name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["trial.status"] == trial["status"]
        assert run.data.params == {name: str(value) for name, value in trial["values"].items()}
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert sorted((m.step, m.value) for m in history) == [(r["epoch"], r["val_accuracy"]) for r in trial["history"]]
    assert [file.path for file in client.list_artifacts(search.info.run_id, "figures")] == ["figures/search.html"]
