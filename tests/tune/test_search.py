"""`tune.search` on a real Ray cluster, with trials that take milliseconds instead of minutes."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.tune.schedulers import TrialScheduler

from perceiver.config import PerceiverConfig
from pipeline.masking import mask
from pipeline.storage import Storage
from tune.config import SearchConfig
from tune.journal import SCORE, Journal, Trial
from tune.search import scheduler, search
from tune.space import Sample, Space
from tune.trial_process import Report

EPOCHS = 4
# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def settings(**changes: Any) -> SearchConfig:
    """A search over the learning rate."""
    others = ("latent_dim", "num_self_attention_blocks", "weight_decay")
    fixed: dict[str, Any] = {"num_latents": (8,), "num_self_attention_heads": (2,), "num_iterations": (1,)}
    fixed |= dict.fromkeys(others, ())
    searched: dict[str, Any] = {"epochs": EPOCHS, "reduction_factor": 2, "learning_rate": (1e-4, 1e-1)}
    return SearchConfig(**(fixed | searched | changes))


def accuracy(sample: Sample, epoch: int) -> float:
    """Grows with the epochs and is highest at a learning rate of 0.01."""
    return 1 / (1 + abs(math.log10(sample["learning_rate"]) + 2)) - 0.1 / epoch


@dataclass(frozen=True)
class ToyTraining:
    """A `TrainTrial` that reports `accuracy`. Each call and each epoch adds a line to the log of the trial.

    Attributes:
        folder: folder of the logs and the checkpoints.
        raises: numbers (from 1) of the trials that raise an error in their first epoch.
        diverges: numbers of the trials whose loss becomes NaN.
        allocates: numbers of the trials that exceed the memory limit.
        dies: numbers of the trials whose process is killed once.
        message: text of the error of the trials that raise one; empty: names the trial.
    """

    folder: Path
    raises: tuple[int, ...] = ()
    diverges: tuple[int, ...] = ()
    allocates: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    message: str = ""
    seconds_per_epoch: float = 0.0

    def __call__(self, sample: Sample, *, trial: str, report: Report) -> None:
        number = int(trial.rpartition("-")[2])
        self._note(trial, f"called in {os.getpid()}")
        if number in self.raises:
            raise RuntimeError(self.message or f"{trial} cannot be trained")
        if number in self.diverges:
            raise ArithmeticError("the training loss is nan at epoch 1, step 1")
        state = self.folder / f"{trial}.json"
        begun = json.loads(state.read_text()) if state.exists() else 0
        for epoch in range(1, EPOCHS + 1):
            if epoch > begun:
                time.sleep(self.seconds_per_epoch)
                self._note(trial, f"epoch {epoch}")
            if number in self.dies and not (died := self.folder / f"{trial}.died").exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number in self.allocates:
                memory = bytearray(b"\1") * 2**30
                time.sleep(60 + len(memory) * 0)
            (new := state.with_suffix(".new")).write_text(json.dumps(max(epoch, begun)))
            new.replace(state)  # atomic: this process may be killed here
            metrics = {"epoch": epoch, "val_accuracy": accuracy(sample, epoch), "seconds": self.seconds_per_epoch}
            report(metrics, again=epoch <= begun)

    def _note(self, trial: str, line: str) -> None:
        with (self.folder / f"{trial}.log").open("a") as file:
            file.write(f"{line}\n")


def executed(folder: Path) -> dict[str, list[str]]:
    """The epochs that each trial has trained, by name of the trial."""
    logs = {path.stem: path.read_text().split("\n")[:-1] for path in folder.glob("*.log")}
    return {name: [line for line in lines if not line.startswith("called")] for name, lines in logs.items()}


def processes(folder: Path) -> set[str]:
    lines = [line for path in folder.glob("*.log") for line in path.read_text().splitlines()]
    return {line for line in lines if line.startswith("called")}


def run(training: ToyTraining, config: SearchConfig, journal: Journal | None = None, **more: Any) -> dict[str, Any]:
    space, folder = Space.of(config, PerceiverConfig()), training.folder
    journal = journal or Journal(Storage(str(folder / "state")), "trials")
    return search(training, space, config, journal=journal, storage_path=str(folder / "ray"), **more)


@pytest.mark.usefixtures("ray_cluster")
def test_failing_trials_do_not_stop_the_search(tmp_path: Path) -> None:
    training = ToyTraining(tmp_path, raises=(2,), diverges=(3,), allocates=(4,), dies=(5,))
    calls: list[tuple[str, str, float | None]] = []
    config = settings(num_trials=9, memory_limit_gib=1.0)
    preset = {"learning_rate": 0.01}
    found = run(
        training, config, preset=preset, watch=lambda trial, left, new: calls.append((trial.name, trial.status, left))
    )
    trials, epochs = {trial["name"]: trial for trial in found["trials"]}, executed(tmp_path)
    assert list(trials) == [f"trial-{number:04d}" for number in range(1, 10)]
    assert found["best_trial"] == "trial-0001"
    assert found["best"] == {
        "num_latents": 8,
        "num_self_attention_heads": 2,
        "num_iterations": 1,
        "learning_rate": 0.01,
    }, "the preset is tried first"
    assert found["best_value"] == pytest.approx(accuracy({"learning_rate": 0.01}, EPOCHS))
    errors = {name: trials.pop(name)["error"] for name in ("trial-0002", "trial-0003", "trial-0004")}
    assert errors["trial-0002"] == "RuntimeError: trial-0002 cannot be trained"
    assert errors["trial-0003"] == "ArithmeticError: the training loss is nan at epoch 1, step 1"
    assert errors["trial-0004"].startswith("MemoryError: ")
    assert "search.memory_limit_gib = 1" in errors["trial-0004"]
    assert epochs["trial-0005"][:2] == ["epoch 1", "epoch 1"], "a process that dies once is replaced"
    for trial in trials.values():
        assert (trial["status"], trial["error"]) in [("finished", None), ("stopped early", None)]
        assert [row["epoch"] for row in trial["history"]] == list(range(1, len(trial["history"]) + 1))
        assert (len(trial["history"]) == EPOCHS) == (trial["status"] == "finished")
        assert trial["best_value"] == accuracy(trial["values"], len(trial["history"]))
    assert {trial["status"] for trial in trials.values()} == {"finished", "stopped early"}
    ends = {name: status for name, status, _ in calls}
    assert ends == {trial["name"]: trial["status"] for trial in found["trials"]}
    assert calls[-1][2] == 0, "seconds left"
    # Two trials at a time; a process is replaced only where one died.
    assert len(processes(tmp_path)) <= 2 + 2 + 1
    json.dumps(found)


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_without_a_completed_epoch_raises_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no trial .* first one: RuntimeError: trial-0001 cannot be trained"):
        run(ToyTraining(tmp_path, raises=(1,)), settings(num_trials=1))


@pytest.mark.usefixtures("ray_cluster")
def test_no_file_of_a_search_holds_the_login_that_an_error_quotes(tmp_path: Path) -> None:
    """Neither the record of the search, nor that of a later one, nor what Ray Tune writes for itself."""
    training = ToyTraining(tmp_path, raises=(2,), message="s3://AKIAEXAMPLE:hunter2@bucket/runs refuses")
    store = Storage(str(tmp_path / "state"))
    found = run(training, settings(num_trials=2), Journal(store, "first", mask=mask))
    assert [trial["error"] for trial in found["trials"]] == [None, "RuntimeError: s3://***@bucket/runs refuses"]
    with_error = Trial.from_dict(found["trials"][1])
    with_error.error = training.message
    Journal(store, "old").write(with_error)  # as an earlier version of this project stored it
    later = Journal(store, "later", ["first", "old"], mask=mask)
    taken_over = later.earlier(Space.of(settings(), PerceiverConfig()))
    assert [trial.error for trial in taken_over if trial.error] == [
        "RuntimeError: s3://***@bucket/runs refuses",
        "s3://***@bucket/runs refuses",
    ]
    later.write_death("trial-0001", training.message)
    assert later.death("trial-0001") == "s3://***@bucket/runs refuses"
    (tmp_path / "state" / "old" / "trial-0002.json").unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("ray" in path.relative_to(tmp_path).parts for path in written)
    assert [path for path in written if b"hunter2" in path.read_bytes()] == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_search_continues(tmp_path: Path) -> None:
    training = ToyTraining(tmp_path, seconds_per_epoch=0.25)

    @ray.remote(num_cpus=0, max_retries=0)
    def run_there() -> dict[str, Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        return run(training, settings(num_trials=4, grace_epochs=EPOCHS))

    cut_off = run_there.remote()
    deadline = time.monotonic() + 60
    while len(executed(tmp_path)) < 3:  # two at a time: one is finished
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(cut_off)
    # In the same job, like a retried task: the resources of the killed search must be free again.
    found, after = ray.get(run_there.remote(), timeout=60), executed(tmp_path)
    assert [trial["name"] for trial in found["trials"]] == sorted(after)
    assert len(after) == 4
    outcomes = [(trial["name"], trial["status"], trial["error"], len(trial["history"])) for trial in found["trials"]]
    assert outcomes == [(name, "finished", None, EPOCHS) for name in sorted(after)]
    whole = [f"epoch {epoch}" for epoch in range(1, EPOCHS + 1)]
    finished_before = [name for name in after if after[name] == whole]
    assert "trial-0001" in finished_before or "trial-0002" in finished_before
    for epochs in after.values():
        assert sorted(set(epochs)) == whole
        assert len(epochs) <= EPOCHS + 1, "a trial continues from its checkpoint"


@pytest.mark.usefixtures("ray_cluster")
def test_earlier_trials_are_used(tmp_path: Path) -> None:
    store, trainings = Storage(str(tmp_path / "state")), []
    for name in ("first", "second", "alone"):
        (tmp_path / name).mkdir()
        trainings.append(ToyTraining(tmp_path / name))
    before = run(trainings[0], settings(num_trials=2), Journal(store, "first"), preset={"learning_rate": 0.01})
    config = settings(num_trials=2, learning_rate=(2e-3, 1e-1), seed=1)
    found = run(trainings[1], config, Journal(store, "second", ["first"]))
    assert found["earlier"] == sum(trial["values"]["learning_rate"] >= 2e-3 for trial in before["trials"])
    assert found["best"]["learning_rate"] == 0.01, "found by the first search"
    assert len(found["trials"]) == len(executed(tmp_path / "second")) == 2
    config = settings(num_trials=1, learning_rate=(2e-3, 1e-1), use_earlier_trials=False)
    assert run(trainings[2], config, Journal(store, "alone", ["first"]))["earlier"] == 0


@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_that_earlier_searches_have_tried_is_not_trained_again(tmp_path: Path) -> None:
    store, training = Storage(str(tmp_path / "state")), ToyTraining(tmp_path)
    grid = settings(algorithm="grid", grid_points=2, num_trials=2)
    first = run(training, grid, Journal(store, "first"))
    found = run(training, replace(grid, num_trials=4), Journal(store, "second", ["first"]))
    assert (found["trials"], found["earlier"]) == ([], 2)
    assert (found["best"], found["best_value"]) == (first["best"], first["best_value"])


@pytest.mark.parametrize(
    ("warmup_epochs", "grace_epochs", "stopped_after"),
    [(0.0, 1, 1), (0.5, 1, 1), (1.0, 1, 2), (2.5, 1, 3), (1.0, 3, 3)],
)
def test_no_trial_is_stopped_in_the_warm_up(warmup_epochs: float, grace_epochs: int, stopped_after: int) -> None:
    asha: Any = scheduler(settings(epochs=9, grace_epochs=grace_epochs), warmup_epochs=warmup_epochs)
    trials = [SimpleNamespace(trial_id=str(number)) for number in range(3)]
    for trial in trials:
        asha.on_trial_add(None, trial)
    decisions: dict[str, list[str]] = {}
    for value, trial in zip((0.9, 0.8, 0.1), trials, strict=True):
        results = [{"epoch": epoch, SCORE: value} for epoch in range(1, 4)]
        decisions[trial.trial_id] = [asha.on_trial_result(None, trial, result) for result in results]
    assert decisions["0"] == [TrialScheduler.CONTINUE] * 3, "nothing to compare it with"
    assert decisions["2"][: stopped_after - 1] == [TrialScheduler.CONTINUE] * (stopped_after - 1)
    assert decisions["2"][stopped_after - 1] == TrialScheduler.STOP


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_whose_trials_are_all_warm_up_stops_none(tmp_path: Path) -> None:
    found = run(ToyTraining(tmp_path), settings(num_trials=4), warmup_epochs=5.0)
    assert {trial["status"] for trial in found["trials"]} == {"finished"}
