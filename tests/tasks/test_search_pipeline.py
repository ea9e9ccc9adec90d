"""Searches of the real pipeline on the embedded digits, for properties that a toy training cannot show."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EPOCHS = 2


def run(storage: Path, ray_folder: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """Runs a search; returns its trials and its output."""
    command = [sys.executable, str(ROOT / "pipeline" / "run.py"), "quickstart", "--until", "search"]
    command += ["--storage", str(storage), "--search.epochs", str(EPOCHS), *options]
    env = os.environ | {"RAY_TMPDIR": str(ray_folder)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    paths = sorted(storage.glob("tasks/search/*/state/trials/trial-*.json"))
    return [json.loads(path.read_text()) for path in paths], done.stdout


@pytest.mark.slow
def test_trials_on_two_workers_each(tmp_path: Path, ray_folder: Path) -> None:
    options = ("--search.num-trials", "2", "--search.workers-per-trial", "2", "--search.grace-epochs", str(EPOCHS))
    trials, printed = run(tmp_path, ray_folder, *options)
    assert [(trial["status"], trial["error"]) for trial in trials] == [("finished", None)] * 2, printed
    for trial in trials:
        assert [row["epoch"] for row in trial["history"]] == list(range(1, EPOCHS + 1))
        assert {row["num_workers"] for row in trial["history"]} == {2}
    assert trials[0]["ended"] <= trials[1]["started"] + 1, "two CPUs have room for one such trial at a time"


@pytest.mark.slow
def test_a_trial_whose_loss_is_no_number(tmp_path: Path, ray_folder: Path) -> None:
    """The other trial is the best, and the error of the diverged one names the learning rate."""
    options = "--search.num-trials 2 --search.algorithm grid --search.grid-points 2 --search.learning-rate 0.002 1e30"
    options += (
        " --model.num-latents 16 --model.latent-dim 64 --model.num-self-attention-heads 4 --model.num-iterations 2"
    )
    options += " --model.num-self-attention-blocks 1 --train.weight-decay 0.01"
    trials, printed = run(tmp_path, ray_folder, *options.split())
    by_rate = {trial["values"]["learning_rate"]: trial for trial in trials}
    assert sorted(by_rate) == [0.002, 1e30], printed
    diverged, good = by_rate[1e30], by_rate[0.002]
    assert (diverged["status"], good["status"]) == ("failed", "finished")
    assert "the training loss is nan at epoch 1" in diverged["error"]
    assert "lower train.learning_rate = 1e+30" in diverged["error"]
    (manifest,) = tmp_path.glob("tasks/search/*/manifest.json")
    assert json.loads(manifest.read_text())["output"]["best_trial"] == good["name"]
