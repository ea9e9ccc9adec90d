"""A trial of the search that has a checkpoint: which epochs it reports, and as what."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks.trial import TrialTraining
from pipeline.training.checkpoint_store import STATE_FILE, CheckpointStore


def test_the_epochs_of_a_checkpoint_are_reported_as_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, storage, reported = quickstart(), Storage(str(tmp_path / "runs")), []

    def train_one_epoch(*arguments: Any) -> None:
        assert arguments[-2] is not None, "the folder of the checkpoint"
        arguments[-1]({"epoch": 3})

    def report(metrics: Mapping[str, Any], *, again: bool = False) -> None:
        reported.append((metrics["epoch"], again))

    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / STATE_FILE).write_text(json.dumps({"history": [{"epoch": 1}, {"epoch": 2}]}))
    CheckpointStore(storage, "state/trial-0001/checkpoints", kept=1).commit(tmp_path / "checkpoint", 2, 0)
    monkeypatch.setattr(TrialTraining, "_in_process", staticmethod(train_one_epoch))
    training = TrialTraining(config.model, config.trial_training(), {}, None, storage, "state")  # type: ignore[arg-type]
    training({}, trial="trial-0001", report=report)
    assert reported == [(1, True), (2, True), (3, False)]
