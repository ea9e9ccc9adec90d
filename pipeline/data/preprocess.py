"""Validates, splits and shuffles ingested rows into Parquet shards, with Ray Data."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from pipeline.data.config import DatasetConfig
from pipeline.data.exchange import Target, exchange
from pipeline.data.image_progress import ImageCounter, Report
from pipeline.data.ray_rows import CorruptShardError, own_errors, read_files
from pipeline.data.rows import Rows, row_digests, stratified_split
from pipeline.data.shards import MOST_VALIDATION_SHARD_BYTES, read_rows, shard_count, write_rows
from pipeline.storage import CorruptFileError, Storage

_EVALUATION_SHARDS = 4
"""Shards of the validation and of the test split, or more of them."""
_WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}


def preprocess(
    config: DatasetConfig,
    ingested: dict[str, Any],
    storage: Storage,
    out: str,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """Writes the rows that `ingest` wrote as shards below `out`; the same config gives the same bytes.

    Unless the source has a validation split, its rows are taken from the training rows: `round(validation_fraction *
    rows)` of each class. The rows of a split are shuffled over its shards.

    Args:
        config: Shares, number of shards and seed.
        ingested: Output of `ingest`.
        storage: Where the files of `ingest` are and the shards go.
        out: Storage prefix of the shards.
        report: Shows an `ImageProgress`.

    Returns:
        Manifest: `image_shape`, `num_classes`, `label_names`, `coarse_label_names`, `pixel_mean` and `pixel_std` of
        each channel over the training rows in [0, 1], `digest`, and `splits`, which has for `train`, `validation` and
        `test` `{rows, class_counts, digest, shards: [{path, rows, sha256}]}`; of image files `decoding` and
        `coarse_of_class` of `ingest`.

        The digest of a split is the SHA-256 of the SHA-256s of its rows in order of row_id. It depends on the rows and
        not on their layout in shards. The bytes of a row are row_id as int64, label and, if there is one, coarse label
        as int32, all little-endian, then the image. The digest of the whole is the SHA-256 of the digests of `train`,
        `validation` and `test`.

    Raises:
        CorruptShardError: if a file has other bytes than `ingested` names.
        ValueError: if its rows do not have the promised shape, type and range, or no row is left for validation.
    """
    row_bytes = int(np.prod(ingested["image_shape"]))
    with own_errors():
        labels = {name: _labels(_validated(ingested, name, storage)) for name in ingested["files"]}
        if "validation" in labels:  # the source has its own
            held_in = "validation"
            train, validation = (np.arange(len(labels[name])) for name in ("train", "validation"))
        else:
            held_in = "train"
            train, validation = stratified_split(labels["train"], config.validation_fraction, config.seed)
        splits = {
            "train": ("train", train, config.num_shards),
            "validation": (
                held_in,
                validation,
                shard_count(len(validation), _EVALUATION_SHARDS, row_bytes, MOST_VALIDATION_SHARD_BYTES),
            ),
            "test": ("test", np.arange(len(labels["test"])), _EVALUATION_SHARDS),
        }
        shards = [
            _Shard(split, source, part, storage.join(out, split, f"{number:05d}.parquet"))
            for split, (source, row_ids, num_shards) in splits.items()
            for number, part in enumerate(_shuffled_parts(row_ids, num_shards, row_bytes, config.seed))
        ]
        total = sum(map(len, labels.values()))
        records = []
        sorting = ImageCounter("preprocess", "sorted", total, row_bytes, report)
        writing = ImageCounter("preprocess", "written", total, row_bytes, report)
        for record in exchange(
            [(entry, number) for number, files in enumerate(ingested["files"].values()) for entry in files],
            functools.partial(_read, storage=storage),
            [_target(shards, name) for name in ingested["files"]],
            [len(shard.row_ids) for shard in shards],
            row_bytes,
            functools.partial(_write_shard, storage=storage, paths=[shard.path for shard in shards]),
            on_cut=sorting.add,
        ):
            records.append(record)
            writing.add(len(shards[record["shard"]].row_ids))

    records.sort(key=lambda record: record["shard"])
    written = {
        split: [pair for pair in zip(shards, records, strict=True) if pair[0].split == split] for split in splits
    }
    described = {
        split: _describe(written[split], labels[source], ingested["num_classes"])
        for split, (source, *_) in splits.items()
    }
    mean, std = _pixel_statistics([record for _, record in written["train"]])
    digests = b"".join(bytes.fromhex(description["digest"]) for description in described.values())
    kept = ("image_shape", "num_classes", "label_names", "coarse_label_names", "coarse_of_class", "decoding")
    return {key: ingested[key] for key in kept if key in ingested} | {
        "pixel_mean": mean,
        "pixel_std": std,
        "digest": hashlib.sha256(digests).hexdigest(),
        "splits": described,
    }


@dataclass(frozen=True)
class _Shard:
    """The rows of the source's split that go into one file, in order."""

    split: str
    source: str
    row_ids: np.ndarray
    path: str


def _shuffled_parts(row_ids: np.ndarray, least_parts: int, row_bytes: int, seed: int) -> list[np.ndarray]:
    order = np.random.default_rng([seed, 1]).permutation(row_ids)
    return np.array_split(order, shard_count(len(order), least_parts, row_bytes))


def _target(shards: list[_Shard], source: str) -> Target:
    """Where each row of `source` goes."""
    own = [(number, shard.row_ids) for number, shard in enumerate(shards) if shard.source == source]
    row_ids = np.concatenate([ids for _, ids in own])
    target = Target(*np.empty((2, len(row_ids)), np.int64))
    target.shard[row_ids] = np.concatenate([np.full(len(ids), number) for number, ids in own])
    target.place[row_ids] = np.concatenate([np.arange(len(ids)) for _, ids in own])
    return target


def _read(entry: Mapping[str, Any], storage: Storage) -> Rows:
    try:
        return read_rows(entry, storage)
    except CorruptFileError as error:
        raise CorruptShardError(*error.args) from error


def _write_shard(number: int, shard: Rows, storage: Storage, paths: list[str]) -> dict[str, Any]:
    """Writes the rows of one shard; returns what goes into the manifest."""
    channels = shard.images.reshape(-1, shard.image_shape[-1]).T
    return {
        "shard": number,
        "sha256": write_rows(shard, storage, paths[number])["sha256"],
        "row_digests": row_digests(shard),
        "histograms": [np.bincount(channel, minlength=256) for channel in channels],
    }


def _describe(written: list[tuple[_Shard, dict[str, Any]]], labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """The manifest of a split."""
    row_ids = np.concatenate([shard.row_ids for shard, _ in written])
    digests = np.concatenate([np.frombuffer(record["row_digests"], "V32") for _, record in written])
    return {
        "rows": len(row_ids),
        "class_counts": np.bincount(labels[row_ids], minlength=num_classes).tolist(),
        "digest": hashlib.sha256(digests[np.argsort(row_ids)].tobytes()).hexdigest(),
        "shards": [
            {"path": shard.path, "rows": len(shard.row_ids), "sha256": record["sha256"]} for shard, record in written
        ],
    }


def _pixel_statistics(records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], from exact counts: no order of addition matters."""
    histograms = np.sum([np.stack(record["histograms"]) for record in records], axis=0)
    shares = histograms / histograms.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = (shares * levels).sum(axis=1)
    variance = (shares * (levels - mean[:, np.newaxis]) ** 2).sum(axis=1)
    return mean.tolist(), np.sqrt(variance).tolist()


def _validated(ingested: dict[str, Any], name: str, storage: Storage) -> ray.data.Dataset:
    """Row ids and labels of a split of the source, whose rows are checked on the way."""
    coarse_names = ingested["coarse_label_names"]
    validate = functools.partial(
        _validate,
        image_shape=tuple(ingested["image_shape"]),
        ranges={"label": ingested["num_classes"]} | ({"coarse_label": len(coarse_names)} if coarse_names else {}),
    )
    return read_files(ingested["files"][name], storage).map_batches(validate, **_WHOLE_BLOCKS)


def _validate(rows: pa.Table, image_shape: tuple[int, ...], ranges: dict[str, int]) -> pa.Table:
    expected = pa.fixed_shape_tensor(pa.uint8(), image_shape)
    if (found := rows.schema.field("image").type) != expected:
        raise ValueError(f"ingested rows: expected images of type {expected}, found {found}")
    for column, count in ranges.items():
        labels = rows[column].to_numpy()
        if labels.dtype != np.int32 or labels.min() < 0 or labels.max() >= count:
            raise ValueError(
                f"ingested rows: expected {column} int32 from 0 to {count - 1}, found {labels.dtype} from "
                f"{labels.min()} to {labels.max()}"
            )
    return rows.select(["row_id", "label"])


def _labels(rows: ray.data.Dataset) -> np.ndarray:
    """The label of each row_id.

    Raises:
        ValueError: if the row_ids are not 0, 1, ... N - 1.
    """
    batches = list(rows.iter_batches(batch_size=None))
    row_ids = np.concatenate([batch["row_id"] for batch in batches])
    order = np.argsort(row_ids)
    if not np.array_equal(row_ids[order], np.arange(len(row_ids))):
        raise ValueError(f"ingested rows: expected each row_id from 0 to {len(row_ids) - 1} once")
    return np.concatenate([batch["label"] for batch in batches])[order]
