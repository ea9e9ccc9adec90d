"""Evaluates a registered model by its URI. Needs neither Ray nor the storage folder of the run that trained it.

    python -m pipeline.evaluate_version models:/perceiver@champion --data.source digits
    python -m pipeline.evaluate_version models:/perceiver/3 --tracking-uri http://host:5000 --split validation

Prints one line of JSON: the version, the split and its SHA-256, `top1`, `top5`, `balanced_accuracy`, `loss`, `ece` and
images/s, and whether the rows are the test rows with which the version was registered. `underflows` is the number of
rows whose label has a probability that float32 rounds to zero: `loss` is null if there are any, and so is `top5` if it
is not known. One's own images are fitted as those were with which the model was trained. Exit codes: 0 done, 2 an
argument cannot be used.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from pipeline.command import end, libraries_to_log, run_command
from pipeline.data.config import DatasetConfig
from pipeline.data.download import check_archive
from pipeline.data.ingest import load
from pipeline.data.rows import RawDataset, Rows, rows_digest, stratified_split
from pipeline.data.sources import source_of
from pipeline.evaluation.calibration import reliability
from pipeline.evaluation.metrics import scores
from pipeline.registry.fetch import RegisteredModel, fetch, version_tags

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
    if data.source != "files":
        check_archive(data, source_of(data))
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(options.model, options.tracking_uri, Path(folder), options.trust)
        if data.source == "files":
            data = _found(data, model)
        if model.image_shape != (shape := source_of(data).image_shape):
            raise ValueError(
                f"model = {options.model!r} takes images {model.image_shape}, but data.source = {options.data.source} "
                f"has {shape}: give --data.{'image-size' if data.source == 'files' else 'source'}"
            )
        raw = load(data)
        rows, number_of = _rows(data, raw, options.split), _class_numbers(raw.label_names, model)
        predict = model.load()
        start = time.perf_counter()
        batches = range(0, len(rows), BATCH_SIZE)
        probabilities = np.concatenate([predict(rows.images[i : i + BATCH_SIZE]) for i in batches])
        seconds = time.perf_counter() - start
    digest, labels = rows_digest(rows), number_of[rows.labels]
    registered_with = version_tags(model.uri, options.tracking_uri).get("test.sha256")
    return {
        "model": model.uri,
        "source": options.data.source,
        "split": options.split,
        "sha256": digest,
        "is_registered_test_split": digest == registered_with,
        **_scores(probabilities, labels),
        "ece": reliability(probabilities, labels, CALIBRATION_BINS)["ece"],
        "images_per_second": len(rows) / seconds,
    }


def _found(data: DatasetConfig, model: RegisteredModel) -> DatasetConfig:
    """The images at `data.path`, fitted to the model as those of its training were, and as `pipeline.predict` does."""
    from pipeline.data.image_survey import find_images

    height, width, channels = model.image_shape
    if model.resize:
        size = data.image_size or (height if height == width else None)
        data = replace(data, resize=model.resize, image_size=size)
    if data.channels is None:
        data = replace(data, channels=1 if channels == 1 else 3)
    return find_images(data, ".", keep_survey=False)


def _scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """`scores` of a model that returns probabilities, without what float32 has rounded away; and `underflows`."""
    # The logarithms of probabilities are logits with the same softmax.
    tiny = np.finfo(np.float32).tiny
    found = scores(np.log(np.maximum(probabilities, tiny)), labels)
    is_gone = probabilities[np.arange(len(labels)), labels] < tiny
    # With five classes that are likelier, it is no hit whatever its probability; of five classes, each is one.
    is_tied = is_gone & ((probabilities >= tiny).sum(axis=1) < 5) & (probabilities.shape[1] > 5)
    found |= ({"loss": None} if is_gone.any() else {}) | ({"top5": None} if is_tied.any() else {})
    return found | {"underflows": int(is_gone.sum())}


def _class_numbers(names: Sequence[str], model: RegisteredModel) -> np.ndarray:
    """The number that the model gives to each class of the data, int32 (classes,): by name, if the data have names.

    Raises:
        ValueError: if the model does not know a class.
    """
    known = {name: number for number, name in enumerate(model.label_names)}
    if unknown := [name for name in names if name not in known]:
        if list(names) == [str(number) for number in range(len(names))] and len(names) == len(known):
            return np.arange(len(names), dtype=np.int32)  # numbers alone, which can only be those of the model
        raise ValueError(
            f"model = {model.uri!r} does not know {len(unknown)} of the {len(names)} classes of the data, such as "
            f"{unknown[0]!r}; it knows {', '.join(model.label_names[:3])}, ...: give the data that it was trained for"
        )
    return np.array([known[name] for name in names], np.int32)


def _rows(data: DatasetConfig, raw: RawDataset, split: str) -> Rows:
    """All rows of the split."""
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
    end(main())
