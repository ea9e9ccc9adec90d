"""`tune`: the search space, and searches on a real Ray whose trials take milliseconds instead of minutes."""

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from perceiver.config import PerceiverConfig
from tune.config import SearchConfig
from tune.search import Report, search
from tune.space import fixed_values, param_space, to_model

EPOCHS = 4
# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def settings(**changes: Any) -> SearchConfig:
    """A search over the learning rate."""
    fixed: dict[str, Any] = {"num_latents": (8,), "num_self_attention_heads": (2,), "num_iterations": (1,)}
    searched: dict[str, Any] = {"epochs": EPOCHS, "reduction_factor": 2, "learning_rate": (1e-4, 1e-1)}
    return SearchConfig(**(fixed | searched | changes))


def accuracy(sample: dict[str, Any], epoch: int) -> float:
    """Grows with the epochs, and is highest at a learning rate of 0.01."""
    return 1 / (1 + abs(math.log10(sample["learning_rate"]) + 2)) - 0.1 / epoch


def toy_driver(
    sample: dict[str, Any], data: dict[str, Any], *, trial: str, report: Report, resume_from: Path | None
) -> None:
    """A `TrialDriver`: reports `accuracy`. Each call and each epoch adds a line to a file of the trial."""
    log = Path(data["folder"]) / f"{trial}.log"

    def note(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    for number in range(100):  # the trials are numbered in the order in which they start
        claim = Path(data["folder"]) / f"{number}.trial"
        with contextlib.suppress(FileExistsError):
            with claim.open("x") as file:
                file.write(trial)
            break
        if claim.read_text() == trial:
            break
    note("called")
    if number in data.get("raises", ()):
        raise RuntimeError(f"trial {number} cannot be trained")
    first = json.loads((resume_from / "state.json").read_text())["epoch"] + 1 if resume_from else 1
    for epoch in range(first, EPOCHS + 1):
        time.sleep(data.get("seconds_per_epoch", 0))
        value = math.nan if number in data.get("diverges", ()) else accuracy(sample, epoch)
        note(f"epoch {epoch}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state.json").write_text(json.dumps({"epoch": epoch}))
            report({"epoch": epoch, "val_accuracy": value}, Path(folder))


def executed(folder: Path) -> dict[str, list[str]]:
    """What each trial did, by its id."""
    return {path.stem: path.read_text().split("\n")[:-1] for path in folder.glob("*.log")}


def test_dimensions_are_fixed_or_open() -> None:
    config = settings(num_latents=(16, 8, 16), num_iterations=(3, 3))
    assert fixed_values(config) == {"num_self_attention_heads": 2, "num_iterations": 3}
    space = param_space(config)
    assert set(space) == {"num_latents", "learning_rate"}
    assert list(space["num_latents"].categories) == [8, 16]
    assert (space["learning_rate"].lower, space["learning_rate"].upper) == (1e-4, 1e-1)
    assert fixed_values(settings(num_latents=(8, 16), learning_rate=(0.5, 0.5)))["learning_rate"] == 0.5


def test_a_sample_replaces_the_searched_fields_only() -> None:
    base = PerceiverConfig(num_latents=64, latent_dim=96, num_self_attention_heads=4)
    model = to_model({"num_latents": 8, "num_iterations": 3, "learning_rate": 0.1}, base)
    assert model == PerceiverConfig(num_latents=8, latent_dim=96, num_self_attention_heads=4, num_iterations=3)
    with pytest.raises(ValueError, match="num_self_attention_heads = 5 does not divide"):
        to_model({"num_self_attention_heads": 5}, base)


@pytest.mark.usefixtures("ray_cluster")
def test_the_best_is_found_whatever_becomes_of_others(tmp_path: Path) -> None:
    data = {"folder": str(tmp_path), "raises": [2], "diverges": [3]}
    found = search(toy_driver, data, settings(num_trials=6), storage_path=str(tmp_path / "state"), name="tune")
    trials, notes = {trial["id"]: trial for trial in found["trials"]}, executed(tmp_path)
    assert trials.keys() == notes.keys()
    assert len(trials) == 6
    number = {int(path.stem): path.read_text() for path in tmp_path.glob("*.trial")}
    raised, diverged = trials.pop(number[2]), trials.pop(number[3])
    assert raised["status"] == "failed"
    assert raised["error"] == "RuntimeError: trial 2 cannot be trained"
    assert raised["best_value"] is None
    assert notes[number[2]] == ["called", "called"], "tried once more, then left"
    assert diverged["best_value"] is None
    for name, trial in trials.items():
        assert (trial["status"], trial["error"]) == ("finished", None)
        assert notes[name] == ["called", *(f"epoch {epoch}" for epoch in range(1, trial["epochs"] + 1))]
        assert trial["best_value"] == accuracy(trial["values"], trial["epochs"])
    assert {trial["epochs"] for trial in trials.values()} > {EPOCHS}, "no trial was stopped early"
    best = max(trials.values(), key=lambda trial: trial["best_value"])
    assert (found["best_trial"], found["best_value"]) == (best["id"], best["best_value"])
    assert found["best"] == best["values"]
    assert found["best"].keys() == {"num_latents", "num_self_attention_heads", "num_iterations", "learning_rate"}
    json.dumps(found)


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_of_which_nothing_came_raises_what_went_wrong(tmp_path: Path) -> None:
    data = {"folder": str(tmp_path), "raises": [0]}
    with pytest.raises(RuntimeError, match=r"no trial .* first one: RuntimeError: trial 0 cannot be trained"):
        search(toy_driver, data, settings(num_trials=1), storage_path=str(tmp_path / "state"), name="tune")


@pytest.mark.usefixtures("ray_cluster")
def test_what_was_finished_before_a_kill_is_kept(tmp_path: Path) -> None:
    data = {"folder": str(tmp_path), "seconds_per_epoch": 0.25}

    @ray.remote(num_cpus=0, max_retries=0)
    def run() -> dict[str, Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        config = settings(num_trials=4, grace_epochs=EPOCHS)
        return search(toy_driver, data, config, storage_path=str(tmp_path / "state"), name="tune")

    cut_off = run.remote()
    deadline = time.monotonic() + 60
    while sum("epoch 1" in lines for lines in executed(tmp_path).values()) < 3:  # two at a time: one is finished
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(cut_off)
    first = min(tmp_path.glob("*.log"), key=lambda path: path.stat().st_mtime).stem
    # In the same job, as a task that is tried again; what the killed one held must be free again.
    found, after = ray.get(run.remote(), timeout=60), executed(tmp_path)
    assert {trial["id"] for trial in found["trials"]} == after.keys()
    assert len(after) == 4
    assert all(trial["epochs"] == EPOCHS for trial in found["trials"])
    whole = ["called", *(f"epoch {epoch}" for epoch in range(1, EPOCHS + 1))]
    assert after[first] == whole, "what was finished is not run again"
    for lines in after.values():
        assert set(lines) == set(whole)
        assert len([line for line in lines if line != "called"]) <= EPOCHS + 1, "what has a checkpoint goes on from it"
