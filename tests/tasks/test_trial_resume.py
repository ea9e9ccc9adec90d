"""A trial of the search that has a checkpoint: which epochs it reports, and as what."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks.events import Warned
from pipeline.tasks.trial import POLL_SECONDS, TrialTraining
from pipeline.training.checkpoint_store import STATE_FILE, CheckpointStore
from pipeline.training.worker import WorkersStarted
from pipeline.workflow.channel import Channel

pytestmark = pytest.mark.usefixtures("ray_cluster")


def training(storage: Storage, channel: Channel) -> TrialTraining:
    config = quickstart()
    return TrialTraining(config.model, config.trial_training(), {}, None, storage, "state", channel)  # type: ignore[arg-type]


def warnings(channel: Channel, number: int) -> set[object]:
    """So many events of a channel, which arrive in the background and in any order."""
    deadline, taken = time.monotonic() + 30, channel.take()
    while len(taken) < number and time.monotonic() < deadline:
        time.sleep(0.05)
        taken += channel.take()
    return set(taken)


def test_the_epochs_of_a_checkpoint_are_reported_as_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, reported = Storage(str(tmp_path / "runs")), []

    def train_one_epoch(*arguments: Any) -> None:
        assert arguments[-2] is not None, "the folder of the checkpoint"
        arguments[-1]({"epoch": 3})

    def report(metrics: Mapping[str, Any], *, again: bool = False) -> None:
        reported.append((metrics["epoch"], again))

    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / STATE_FILE).write_text(json.dumps({"history": [{"epoch": 1}, {"epoch": 2}]}))
    CheckpointStore(storage, "state/trial-0001/checkpoints", kept=1).commit(tmp_path / "checkpoint", 2, 0)
    monkeypatch.setattr(TrialTraining, "_in_process", staticmethod(train_one_epoch))
    training(storage, Channel())({}, trial="trial-0001", report=report)
    assert reported == [(1, True), (2, True), (3, False)]


def test_a_trial_says_that_its_checkpoint_was_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, channel = Storage(str(tmp_path / "runs")), Channel()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / STATE_FILE).write_text(json.dumps({"history": [{"epoch": 1}]}))
    store = CheckpointStore(storage, "state/trial-0001/checkpoints", kept=1)
    name = store.commit(tmp_path / "checkpoint", 1, 0)
    Path(storage.absolute(f"{store.path(name)}/{STATE_FILE}")).write_text("{")
    monkeypatch.setattr(TrialTraining, "_in_process", lambda *arguments: None)
    training(storage, channel)({}, trial="trial-0001", report=lambda metrics, again=False: None)
    (warned,) = warnings(channel, 1)
    assert isinstance(warned, Warned)
    assert warned.task == "search"
    assert warned.text.startswith("trial-0001: the checkpoint ")
    assert warned.text.endswith("is damaged and removed, and none is intact: the training starts from the beginning")


def test_a_trial_on_workers_of_its_own_passes_on_their_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.workers import train as workers

    def train_on_workers(*_: Any, channel: Channel, **__: Any) -> dict[str, Any]:
        channel.report(WorkersStarted(("a:1",), open_ports="open", precision="slow"))
        time.sleep(5 * POLL_SECONDS)
        return {"history": [{"epoch": 1}]}

    channel, reported = Channel(), []
    monkeypatch.setattr(workers, "train", train_on_workers)
    trial = training(Storage(str(tmp_path / "runs")), channel)
    trial._on_workers(trial.model, trial.train, "state", lambda metrics, again=False: reported.append(metrics["epoch"]))
    assert warnings(channel, 2) == {Warned("search", "open"), Warned("search", "slow")}
    assert reported == [1]
