"""Rows in Parquet files that are read only if their bytes are those that a manifest names.

A file holds `row_id` int64 (index of the row in the source's split), `image` uint8 as Arrow's fixed-shape tensor
[H, W, C], `label` int32 and, where the source has one, `coarse_label` int32.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.exceptions
from ray.data.context import ShuffleStrategy
from ray.data.dataset import MaterializedDataset

from pipeline.batches import ImageArrays
from pipeline.datasets import ImageSplit
from pipeline.storage import Storage

_READ_ROWS = 4096
"""Rows that `to_arrays` takes at a time."""


class CorruptShardError(ray.exceptions.UserCodeException, ValueError):
    """The bytes of a file are not those that its manifest names.

    As a `UserCodeException` it is reported by Ray Data in a few lines; any other error, it prints in full, four times.

    Args:
        path: the file, as a path or URI.
        expected: SHA-256 in the manifest.
        found: SHA-256 of the file; None if there is no file.
    """

    def __init__(self, path: str, expected: str, found: str | None) -> None:
        super().__init__(path, expected, found)
        self.path, self.expected, self.found = path, expected, found

    def __str__(self) -> str:
        state = "is missing" if self.found is None else f"has SHA-256 {self.found}"
        return f"{self.path} {state}; expected SHA-256 {self.expected}: run the task that wrote it again with --force"


def write_rows(row_ids: np.ndarray, rows: ImageSplit, storage: Storage, path: str) -> str:
    """Writes rows as one Parquet file, the same bytes for the same rows; returns its SHA-256."""
    columns = {
        "row_id": pa.array(row_ids, pa.int64()),
        "image": pa.FixedShapeTensorArray.from_numpy_ndarray(rows.images),
        "label": pa.array(rows.labels, pa.int32()),
    }
    if rows.coarse_labels is not None:
        columns["coarse_label"] = pa.array(rows.coarse_labels, pa.int32())
    sink = pa.BufferOutputStream()
    # Parquet has no uint8 and stores four bytes for one; dictionary encoding, here the default, makes it one again.
    pq.write_table(pa.table(columns), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_files(files: list[dict[str, Any]], storage: Storage) -> ray.data.Dataset:
    """The rows of `files`, each `{path, rows, sha256}`, read when they are asked for, a task for each file."""
    dataset = ray.data.from_items(files, override_num_blocks=len(files))
    # These settings hold for all that is made of this dataset, and for no other.
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Keeps the type of an error, so that a caller can tell a corrupt file from a lost node.
    context.raise_original_map_exception = True
    # `groupby` of 50,000 images on 2 CPUs: 3 s by sorting, 11 s by hashing, which is the default.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    return dataset.map_batches(functools.partial(_read_file, storage=storage), batch_size=1)


def _read_file(batch: dict[str, np.ndarray], storage: Storage) -> pa.Table:
    """Reads the one file that `batch` names, from the bytes whose checksum was verified."""
    path, expected = str(batch["path"][0]), str(batch["sha256"][0])
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise CorruptShardError(storage.absolute(path), expected, None) from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CorruptShardError(storage.absolute(path), expected, found)
    return pq.read_table(pa.BufferReader(data))


def read_split(manifest: dict[str, Any], split: str, storage: Storage) -> ray.data.Dataset:
    """The rows of a split as they lie in its shards, read when they are asked for.

    Args:
        manifest: what `preprocess` returned.
        split: `train`, `validation` or `test`.
        storage: where the shards are.

    Returns:
        Dataset of `row_id`, `image`, `label` and, where there is one, `coarse_label`. Executing it raises a
        `CorruptShardError`, which is also a `RayTaskError`, if a shard's bytes are not those of the manifest.
    """
    return read_files(manifest["splits"][split]["shards"], storage)


def materialize_split(manifest: dict[str, Any], split: str, storage: Storage) -> MaterializedDataset:
    """`read_split` read and verified.

    Raises:
        CorruptShardError: names the shard and both checksums.
    """
    with own_errors():
        return read_split(manifest, split, storage).materialize()


def to_arrays(rows: ray.data.Dataset | ray.data.DataIterator) -> ImageArrays:
    """Collects a dataset of `read_split`, or a worker's part of it, in order of `row_id`."""
    with own_errors():
        batches = list(rows.iter_batches(batch_size=_READ_ROWS))
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    order = np.argsort(columns["row_id"])
    coarse = columns["coarse_label"][order] if "coarse_label" in columns else None
    return ImageArrays(columns["row_id"][order], columns["image"][order], columns["label"][order], coarse)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raises a ValueError of a task of Ray Data as itself, without Ray's wrapping and traceback."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
