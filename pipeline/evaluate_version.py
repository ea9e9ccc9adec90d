"""Evaluates a registered model by its URI. Needs neither Ray nor the storage folder of the run that trained it.

    python -m pipeline.evaluate_version models:/perceiver@champion --data.source digits
    python -m pipeline.evaluate_version models:/perceiver/3 --tracking-uri http://host:5000 --split validation

Prints one line of JSON: the version, the split and its SHA-256, `top1`, `top5`, `balanced_accuracy`, `loss`, `ece` and
images/s, and whether the rows are the test rows with which the version was registered. Exit codes: 0 done, 2 an
argument cannot be used.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from pipeline.command import libraries_to_log, run_command
from pipeline.data.config import DatasetConfig
from pipeline.data.download import check_archive
from pipeline.data.ingest import load
from pipeline.data.rows import Rows, rows_digest, stratified_split
from pipeline.data.sources import source_of
from pipeline.evaluation.calibration import reliability
from pipeline.evaluation.metrics import scores
from pipeline.registry.fetch import fetch, version_tags

BATCH_SIZE, CALIBRATION_BINS = 256, 15


@dataclass(frozen=True)
class Options:
    """The version to evaluate, and the rows."""

    model: tyro.conf.Positional[str]
    """models:/NAME/VERSION, models:/NAME@ALIAS, or a folder with an MLmodel file."""
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI of the registry that has the model."""
    split: Literal["train", "validation", "test"] = "test"
    """Rows to evaluate on; the splits are those of a run with the same `data` settings."""
    data: DatasetConfig = field(default_factory=DatasetConfig)
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Load a model of another kind than this pipeline exports too: loading it may run its code."""


def evaluate_version(options: Options) -> dict[str, Any]:
    """Evaluates the model on the split; returns the fields of the JSON line.

    Raises:
        ValueError: If the model or the data cannot be used.
    """
    data = options.data
    if data.source == "files":
        from pipeline.data.image_survey import find_images

        data = find_images(data, ".", keep_survey=False)
    source = source_of(data)
    check_archive(data, source)
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(options.model, options.tracking_uri, Path(folder), options.trust)
        if model.image_shape != (shape := source.image_shape):
            raise ValueError(
                f"model = {options.model!r} takes images {model.image_shape}, but data.source = {options.data.source} "
                f"has {shape}: give --data.source"
            )
        predict = model.load()
        rows = _rows(data, options.split)
        start = time.perf_counter()
        batches = range(0, len(rows), BATCH_SIZE)
        probabilities = np.concatenate([predict(rows.images[i : i + BATCH_SIZE]) for i in batches])
        seconds = time.perf_counter() - start
    digest = rows_digest(rows)
    registered_with = version_tags(model.uri, options.tracking_uri).get("test.sha256")
    # The model returns probabilities: their logarithms are logits with the same softmax.
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return {
        "model": model.uri,
        "source": options.data.source,
        "split": options.split,
        "sha256": digest,
        "is_registered_test_split": digest == registered_with,
        **scores(logits, rows.labels),
        "ece": reliability(probabilities, rows.labels, CALIBRATION_BINS)["ece"],
        "images_per_second": len(rows) / seconds,
    }


def _rows(data: DatasetConfig, split: str) -> Rows:
    """All rows of the split."""
    raw = load(data)
    if split == "test":
        return raw.test
    if raw.validation is not None:
        return raw.train if split == "train" else raw.validation
    kept, held_out = stratified_split(raw.train.labels, data.validation_fraction, data.seed)
    return raw.train.take(kept if split == "train" else held_out)


def run() -> int:
    options = tyro.cli(
        Options, prog="python -m pipeline.evaluate_version", description=__doc__, config=(tyro.conf.SuppressFixed,)
    )
    with libraries_to_log():
        found = evaluate_version(options)
    print(json.dumps(found))
    return 0


def main() -> int:
    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
