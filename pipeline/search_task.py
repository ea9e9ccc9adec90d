"""The search task: what a search gets of the pipeline's settings, data and storage, and what is made of its trials."""

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from pipeline.batches import ImageArrays
from pipeline.config import keyed
from pipeline.preprocess import materialize_split, stratified_split, to_arrays
from pipeline.trials import TrialDriver
from pipeline.workflow import Context
from tune.figures import draw
from tune.search import search
from tune.space import Space
from tune.trials import Journal, Trial

SPLITS = ("train", "validation")
COMPARABLE_FILE = "comparable.json"


def run_search(context: Context, space: Space) -> dict[str, Any]:
    """Searches `space`; goes on from the trials that an attempt before has left.

    Returns:
        What `tune.search.search` returns, and `figures`: storage paths.
    """
    settings, storage = context.config.search, context.storage
    folder, digest = f"{context.state}/trials", _comparable(context, space)
    storage.write_json(f"{folder}/{COMPARABLE_FILE}", digest)
    train = context.config.trial_training()
    in_process = settings.workers_per_trial == 1
    rows = [_rows(context, split) for split in SPLITS] if in_process else []
    driver = TrialDriver(
        space.model, train, context.inputs["preprocess"], ray.put(rows), storage, f"{context.state}/checkpoints"
    )

    def watch(trial: Trial, seconds_left: float | None, told: bool) -> None:
        event = {"trial": trial.name, "values": trial.values, "gflops": trial.gflops, "status": trial.status}
        event |= {"epoch": trial.epochs, "best_value": trial.best_value, "error": trial.error, "left": seconds_left}
        context.board.post(task="search", **event, **({"metrics": trial.history[-1]} if told else {}))

    found = search(
        driver,
        space,
        settings,
        journal=Journal(storage, folder, _others(context, digest)),
        storage_path=storage.absolute(f"{context.state}/ray"),
        use_gpu=train.use_gpu,
        preset=asdict(context.config.model) | asdict(context.config.train),
        watch=watch,
    )
    for left in (f"{context.state}/checkpoints", f"{context.state}/ray"):
        storage.delete(left)
    return found | {"figures": _figures(context, space, [Trial.from_dict(row) for row in found["trials"]])}


def _rows(context: Context, split: str) -> ImageArrays:
    """The rows of a split that trials see."""
    settings = context.config.search
    rows = to_arrays(materialize_split(context.inputs["preprocess"], split, context.storage))
    wanted = settings.train_rows if split == "train" else settings.validation_rows
    if not 0 < wanted < len(rows.labels):
        return rows
    _, some = stratified_split(rows.labels, wanted / len(rows.labels), context.config.data.seed)
    return ImageArrays(rows.row_ids[some], rows.images[some], rows.labels[some])


def _comparable(context: Context, space: Space) -> str:
    """Digest of all that the trials of two searches must share to be compared, besides what is searched."""
    splits = context.inputs["preprocess"]["splits"]
    train = keyed(context.config.trial_training())
    same = {
        "data": [splits[split]["digest"] for split in SPLITS],
        "rows": [context.config.search.train_rows, context.config.search.validation_rows],
        "model": {name: value for name, value in asdict(space.model).items() if name not in space.values},
        "train": {name: value for name, value in train.items() if name not in space.values},
    }
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def _others(context: Context, digest: str) -> list[str]:
    """Folders with the trials of other searches that can be compared."""
    storage, searches = context.storage, context.state.split(f"/{context.key}/")[0]
    found = []
    for key in storage.list(searches):
        folder = f"{searches}/{key}/state/trials"
        mark = f"{folder}/{COMPARABLE_FILE}"
        if key != context.key and storage.exists(mark) and storage.read_json(mark) == digest:
            found.append(folder)
    return found


def _figures(context: Context, space: Space, trials: list[Trial]) -> list[str]:
    """Draws the figures into storage; their storage paths."""
    paths = []
    with tempfile.TemporaryDirectory() as folder:
        for file in draw(trials, space, context.config.search, Path(folder)):
            paths.append(f"{context.out}/figures/{file.name}")
            context.storage.upload(file, paths[-1])
    return paths
