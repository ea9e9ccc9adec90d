"""What of a run's events is recorded, in a real SQLite store."""

from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient

from pipeline.config import quickstart
from pipeline.runlog import RunLog


def test_epochs_are_recorded_and_steps_are_not(tmp_path: Path) -> None:
    config = replace(quickstart(), storage=str(tmp_path))
    with RunLog(config, "identity", "quickstart") as log:
        log.event({"task": "evaluate", "step": {"epoch": 1, "step": 3, "steps": 20, "images_per_second": 450.0}})
        log.event({"task": "train", "metrics": {"epoch": 1, "loss": 2.0, "mfu": 0.25}})
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["quickstart", "train"]
    assert runs["train"].data.metrics.items() >= {"loss": 2.0, "mfu": 0.25}.items()
