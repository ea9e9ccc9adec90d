"""Evaluates a registered model by its URI, without the rest of the pipeline: no Ray, no storage, no training.

    python -m pipeline.evaluate_version models:/perceiver@champion --data.source digits
    python -m pipeline.evaluate_version models:/perceiver/3 --tracking-uri http://host:5000 --split validation

Prints one line of JSON: the version, the split and its SHA-256, `top1`, `top5`, `loss`, `ece` and images/s; and whether
these are the test rows that the version was registered with. Exit codes: 0 done, 2 something given cannot be used.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from pipeline.calibration import reliability
from pipeline.config import DatasetConfig
from pipeline.datasets import SOURCES, ImageSplit, check_archive, load
from pipeline.metrics import scores
from pipeline.preprocess import rows_digest, stratified_split
from pipeline.registered_model import fetch, version_tags

BATCH_SIZE, CALIBRATION_BINS = 256, 15


@dataclass(frozen=True)
class Options:
    """Which version, and on which rows."""

    model: tyro.conf.Positional[str]
    """models:/NAME/VERSION, models:/NAME@ALIAS, or a folder with an MLmodel file."""
    tracking_uri: str = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI of the registry in which the model is."""
    split: Literal["train", "validation", "test"] = "test"
    """Rows to evaluate it on, divided as a run with the same `data` settings divides them."""
    data: DatasetConfig = field(default_factory=DatasetConfig)


def evaluate_version(options: Options) -> dict[str, Any]:
    """What the registered model makes of a split.

    Raises:
        ValueError: if the model or the data cannot be used.
    """
    check_archive(options.data)
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(options.model, options.tracking_uri, Path(folder))
        if model.image_shape != (shape := SOURCES[options.data.source].image_shape):
            raise ValueError(
                f"model = {options.model!r} takes images {model.image_shape}, but data.source = {options.data.source} "
                f"has {shape}: give --data.source"
            )
        predict = model.load()
        row_ids, rows = _rows(options)
        start = time.perf_counter()
        batches = range(0, len(row_ids), BATCH_SIZE)
        probabilities = np.concatenate([predict(rows.images[i : i + BATCH_SIZE]) for i in batches])
        seconds = time.perf_counter() - start
    digest = rows_digest(row_ids, rows)
    registered_with = version_tags(model.uri, options.tracking_uri).get("test.sha256")
    # The softmax of logarithms of probabilities is these probabilities.
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return {
        "model": model.uri,
        "source": options.data.source,
        "split": options.split,
        "sha256": digest,
        "is_registered_test_split": digest == registered_with,
        **scores(logits, rows.labels),
        "ece": reliability(probabilities, rows.labels, CALIBRATION_BINS)["ece"],
        "images_per_second": len(row_ids) / seconds,
    }


def _rows(options: Options) -> tuple[np.ndarray, ImageSplit]:
    """Row ids and rows of the split."""
    raw = load(options.data)
    if options.split == "test":
        return np.arange(len(raw.test.labels)), raw.test
    parts = stratified_split(raw.train.labels, options.data.validation_fraction, options.data.seed)
    row_ids = parts[0] if options.split == "train" else parts[1]
    coarse = None if raw.train.coarse_labels is None else raw.train.coarse_labels[row_ids]
    return row_ids, ImageSplit(raw.train.images[row_ids], raw.train.labels[row_ids], coarse)


def main() -> int:
    try:
        options = tyro.cli(Options, prog="python -m pipeline.evaluate_version", description=__doc__)
        print(json.dumps(evaluate_version(options)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
