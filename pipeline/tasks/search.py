"""The search task: what Ray Tune's search is given, and what is made of its trials."""

import contextlib
import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pipeline.data.order import MIB
from pipeline.data.rows import Rows, stratified_split
from pipeline.data.split import open_split
from pipeline.fields import keyed
from pipeline.masking import mask, masked
from pipeline.settings.config import PipelineConfig
from pipeline.tasks.events import Said, TrialChanged
from pipeline.tasks.trial import TrialTraining
from pipeline.workflow import task
from tune.figures import draw
from tune.journal import Journal, Trial
from tune.search import search
from tune.space import Space

Context = task.Context[PipelineConfig]
SPLITS = ("train", "validation")
COMPARABLE_FILE = "comparable.json"


def run_search(context: Context, space: Space) -> dict[str, Any]:
    """Searches `space`; continues with the trials that an earlier attempt has left.

    Returns:
        What `tune.search.search` returns, and `figures`, the storage paths of the figures.
    """
    settings, storage = context.config.search, context.storage
    folder, digest = f"{context.state}/trials", _comparable(context, space)
    storage.write_json(f"{folder}/{COMPARABLE_FILE}", digest)
    train = context.config.trial_training()
    in_process = settings.workers_per_trial == 1
    rows = [trial_rows(context, split) for split in SPLITS] if in_process else []
    training = TrialTraining(
        space.model,
        train,
        context.inputs["preprocess"],
        ray.put(rows),
        storage,
        f"{context.state}/checkpoints",
        context.channel,
    )

    def watch(trial: Trial, seconds_left: float | None, told: bool) -> None:
        context.channel.report(
            TrialChanged(
                trial=trial.name,
                values=trial.values,
                gflops=trial.gflops,
                status=trial.status,
                epochs=trial.epochs,
                best_value=trial.best_value,
                error=trial.error,
                seconds_left=seconds_left,
                metrics=trial.history[-1] if told else None,
            )
        )

    path = storage.absolute(f"{context.state}/ray")
    with tempfile.TemporaryDirectory() as local:
        found = search(
            training,
            space,
            settings,
            journal=Journal(storage, folder, _others(context, digest), mask),
            # Tune writes the path into files of Ray's session, where a login has no place. All it keeps there is its
            # own record, which nobody reads. (A login in the URI has not been tried on several hosts.)
            storage_path=path if mask(path) == path else local,
            name=path,
            use_gpu=train.use_gpu,
            preset=asdict(context.config.model) | asdict(context.config.train),
            warmup_epochs=train.warmup_epochs if train.learning_rate_schedule == "cosine" else 0.0,
            watch=watch,
            say=lambda line: _say(context, line),
        )
    for left in (f"{context.state}/checkpoints", f"{context.state}/ray"):
        storage.delete(left)
    found = masked(found)
    return found | {"figures": _figures(context, space, [Trial.from_dict(row) for row in found["trials"]])}


def trial_rows(context: Context, split: str) -> Rows:
    """The rows of a split on which trials are trained or judged.

    Raises:
        ValueError: if all rows are wanted and do not fit the shuffle window; names the number that does.
    """
    settings, manifest = context.config.search, context.inputs["preprocess"]
    window_mb = context.config.train.shuffle_window_mb
    rows = open_split(manifest, split, context.storage, window_mb)
    wanted = settings.train_rows if split == "train" else settings.validation_rows
    if 0 < wanted < len(rows):
        _, some = stratified_split(rows.labels, wanted / len(rows), context.config.data.seed, every_class=False)
        return rows.take(some)
    if isinstance(rows, Rows):
        return rows
    most = window_mb * MIB // int(np.prod(manifest["image_shape"]))
    raise ValueError(
        f"search.{split}_rows = {wanted}, but the {len(rows):,} rows of {split} do not fit train.shuffle_window_mb = "
        f"{window_mb}, and a trial in one process holds its rows in memory: give at most "
        f"--search.{split}-rows {most}, or --search.workers-per-trial 2, which streams them"
    )


def _comparable(context: Context, space: Space) -> str:
    """Digest of all that two searches must share, besides what is searched, so that their trials can be compared."""
    splits = context.inputs["preprocess"]["splits"]
    train = keyed(context.config.trial_training())
    same = {
        "data": [splits[split]["digest"] for split in SPLITS],
        "rows": [context.config.search.train_rows, context.config.search.validation_rows],
        "model": {name: value for name, value in keyed(space.model).items() if name not in space.values},
        "train": {name: value for name, value in train.items() if name not in space.values},
    }
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def _others(context: Context, digest: str) -> list[str]:
    """Folders of other searches whose trials can be compared with those of this one."""
    storage, searches = context.storage, context.state.split(f"/{context.key}/")[0]
    found = []
    for key in storage.list(searches):
        folder = f"{searches}/{key}/state/trials"
        if key == context.key:
            continue
        # A search of another run may have left none, a damaged one, or one that is being deleted: not to be compared.
        with contextlib.suppress(FileNotFoundError, ValueError):
            if storage.read_json(f"{folder}/{COMPARABLE_FILE}") == digest:
                found.append(folder)
    return found


def _figures(context: Context, space: Space, trials: list[Trial]) -> list[str]:
    """Draws the figures into storage; returns their storage paths."""
    paths = []
    with tempfile.TemporaryDirectory() as folder:
        for file in draw(
            trials, space, context.config.search, Path(folder), lambda line: _say(context, f"warning: {line}")
        ):
            paths.append(f"{context.out}/figures/{file.name}")
            context.storage.upload(file, paths[-1])
    return paths


def _say(context: Context, line: str) -> None:
    context.channel.report(Said("search", line))
