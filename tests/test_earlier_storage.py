"""A storage folder of an earlier version: finished tasks are found done, and a training that was cut off continues.

The archive was made with the last commit before `pipeline/` was divided into packages, of 24 November 2026, by the
commands of these tests. The second one also had `--train.checkpoint-every-steps 1`, and was ended with `kill -9` in its
fifth epoch. The archive lacks the claims of the driver, the figures of the search and the report page.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from processor_time import run_timed

from pipeline.settings.command_line import parse
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run

ROOT = Path(__file__).parents[1]
ARCHIVE = Path(__file__).with_name("storage_2026_11_24.tar.xz")
SMALL = """quickstart --model.latent-dim 8 --model.data-dim 8 --model.num-iterations 1
    --model.num-self-attention-blocks 1 --model.num-cross-attention-heads 1 --model.num-self-attention-heads 1
    --train.num-workers 1 --train.warmup-epochs 1 --train.global-batch-size 128 --data.num-shards 2
    --search.epochs 1 --search.num-latents 2 4 --search.learning-rate --search.weight-decay
    --evaluation.corruption-rows 0 --evaluation.confident-mistakes 2 --evaluation.latency-calls 1"""
FINISHED = "--search.num-trials 2 --train.epochs 2 --tracking.uri http://127.0.0.1:5999"
CUT_OFF = "--search.num-trials 0 --train.epochs 12 --train.early-stopping-patience 12 --until train"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(storage: Path, *arguments: str) -> str:
    command = [sys.executable, "pipeline/run.py", *SMALL.split(), "--storage", str(storage), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_finished_tasks_are_found_done_and_quickly(storage: Path) -> None:
    """All seven of them, but those whose version or inputs have changed since, and what follows from these."""
    found = [json.loads(path.read_text()) for path in storage.glob("tasks/*/*/manifest.json")]
    known = {manifest["task"]: (manifest["version"], manifest["inputs"].keys()) for manifest in found}
    same: set[str] = set()
    for task in TASKS:
        if known.get(task.name) == (task.version, set(task.inputs)) and same.issuperset(task.inputs):
            same.add(task.name)
    trained = ["ingest", "preprocess", "search", "train"]
    assert same >= set(trained), "nobody wants to train again after an update"
    config = parse([*SMALL.split(), "--storage", str(storage), *FINISHED.split()])[1].config
    assert Run(TASKS, config, Storage(config.storage)).done().keys() == same

    arguments = (*SMALL.split(), "--storage", storage, *FINISHED.split(), "--until", "train")
    done, seconds = run_timed("pipeline/run.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.endswith(" done before")] == trained
    assert seconds < 8  # of processor time; it is 5 on a slow core


@pytest.mark.long
def test_a_training_that_was_cut_off_within_an_epoch_continues(storage: Path) -> None:
    (state,) = storage.glob("tasks/train/*/state/checkpoints/000004-000000009-*/state.json")
    before = json.loads(state.read_text())["history"]
    assert len(before) == 4
    tracking = f"sqlite:///{storage.parent}/mlflow.db"
    out = run(storage, *CUT_OFF.split(), "--tracking.uri", tracking)
    assert "train      epoch 5/12" in out
    assert "train      epoch 4/12" not in out
    (manifest,) = state.parents[3].glob("manifest.json")
    history = json.loads(manifest.read_text())["output"]["history"]
    assert history[:4] == before
    assert [epoch["epoch"] for epoch in history] == list(range(1, 13))
    assert history[-1]["loss"] < before[-1]["loss"]
