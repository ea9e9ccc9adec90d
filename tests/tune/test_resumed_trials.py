"""A trial that was cut off reports its epochs again: ASHA has let it pass there, and does not judge it anew."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.tune.schedulers import TrialScheduler

from perceiver.config import PerceiverConfig
from pipeline.storage import Storage
from tune.config import SearchConfig
from tune.journal import AGAIN, SCORE, Journal
from tune.search import scheduler, search
from tune.space import DIMENSIONS, Sample, Space
from tune.trial_process import Report

EPOCHS = 6
# Validation accuracies by epoch: the first trial begins slowly and ends best.
CURVES = {
    "trial-0001": [0.30, 0.50, 0.70, 0.85, 0.90, 0.91],
    "trial-0002": [0.40, 0.42, 0.43, 0.44, 0.45, 0.46],
    "trial-0003": [0.45, 0.46, 0.47, 0.48, 0.49, 0.50],
    "trial-0004": [0.46, 0.47, 0.48, 0.49, 0.50, 0.51],
}
CLOSED: dict[str, Any] = dict.fromkeys([d.name for d in DIMENSIONS if d.name != "learning_rate"], ())
SETTINGS = SearchConfig(**CLOSED, num_trials=4, epochs=EPOCHS, algorithm="random")
# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def decisions(asha: Any, trial: str, values: list[float], known: int = 0) -> list[str]:
    """What ASHA says after each epoch of a trial, of which the first `known` are reported again."""
    stand_in = SimpleNamespace(trial_id=trial)
    asha.on_trial_add(None, stand_in)
    results = [{"epoch": epoch, SCORE: value, AGAIN: epoch <= known} for epoch, value in enumerate(values, 1)]
    return [asha.on_trial_result(None, stand_in, result) for result in results]


def test_asha_does_not_judge_an_epoch_again() -> None:
    asha = scheduler(SETTINGS)
    for name in ("trial-0002", "trial-0003", "trial-0004"):
        decisions(asha, name, CURVES[name][:3])
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    # The second rung is at epoch 3.
    assert decisions(asha, "new", [0.3])[0] == stop
    assert decisions(asha, "resumed", [0.3, 0.3, 0.3], known=3) == [go] * 3
    assert decisions(asha, "good again", [0.3, 0.5, 0.7], known=2) == [go] * 3
    assert decisions(asha, "bad again", [0.3, 0.3, 0.3], known=2) == [go, go, stop], "a new epoch is judged"
    whole = decisions(asha, "whole", CURVES["trial-0001"], known=EPOCHS)
    assert whole == [go] * (EPOCHS - 1) + [stop], "nothing is left to train"


def test_asha_records_an_epoch_that_it_does_not_judge() -> None:
    asha = scheduler(SETTINGS)
    for number in range(3):
        decisions(asha, f"resumed {number}", [0.5], known=1)
    assert decisions(asha, "new", [0.4]) == [TrialScheduler.STOP]


@dataclass(frozen=True)
class CurveTraining:
    """A `TrainTrial` that reports `CURVES`, with the number of its completed epochs as a checkpoint.

    The file `now` says that the first trial has completed all epochs but one while others have ended.
    """

    folder: Path

    def __call__(self, sample: Sample, *, trial: str, report: Report) -> None:
        state = self.folder / f"{trial}.json"
        begun = json.loads(state.read_text()) if state.exists() else 0
        for epoch in range(1, EPOCHS + 1):
            if epoch > begun:
                # Slow enough that the second trial fills the first rung after the first one.
                time.sleep(0.5 if trial == "trial-0001" else 1.2 if (trial, epoch) == ("trial-0002", 1) else 0.15)
                (new := state.with_suffix(".new")).write_text(json.dumps(epoch))
                new.replace(state)  # atomic: this process may be killed here
            if (trial, epoch) == ("trial-0001", EPOCHS - 1) and begun < epoch:
                (self.folder / "now").touch()
            report({"epoch": epoch, "val_accuracy": CURVES[trial][epoch - 1], "seconds": 0.3}, again=epoch <= begun)


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_search_keeps_the_trial_that_was_ahead(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def run_there() -> dict[str, Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        space, journal = Space.of(SETTINGS, PerceiverConfig()), Journal(Storage(str(tmp_path / "state")), "trials")
        return search(CurveTraining(tmp_path), space, SETTINGS, journal=journal, storage_path=str(tmp_path / "ray"))

    cut_off = run_there.remote()
    deadline = time.monotonic() + 60
    while not (tmp_path / "now").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(cut_off)
    assert json.loads((tmp_path / "trial-0001.json").read_text()) == EPOCHS - 1
    found = ray.get(run_there.remote(), timeout=90)
    assert (found["best_trial"], found["best_value"]) == ("trial-0001", 0.91)
    first = found["trials"][0]
    assert (first["status"], len(first["history"])) == ("finished", EPOCHS)
    assert AGAIN not in first["history"][0]
