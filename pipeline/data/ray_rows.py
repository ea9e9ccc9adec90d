"""Reads rows with Ray Data: from Parquet files whose bytes are those that a manifest names, into `Rows`."""

import collections
import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.exceptions
from ray.data.dataset import MaterializedDataset

from pipeline.data.rows import Rows
from pipeline.data.shards import read_table
from pipeline.storage import CorruptFileError, Storage

_READ_ROWS = 4096
"""Rows that `to_rows` takes at a time."""
_ADVICE = re.compile(r"\nFailed to .* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)
"""What `_annotate_exception_with_retry_context` of Ray Data 2.60 adds to an error of a task."""


class CorruptShardError(ray.exceptions.UserCodeException, CorruptFileError):
    """A shard is missing or has other bytes than its manifest names.

    As a `UserCodeException` it is reported by Ray Data in a few lines. Any other error is printed in full, four times.
    """


def read_files(files: list[dict[str, Any]], storage: Storage) -> ray.data.Dataset:
    """The rows of `files`, each `{path, rows, sha256}`, read when they are asked for, a task for each file."""
    dataset = configured(ray.data.from_items(files, override_num_blocks=len(files)))
    return dataset.map_batches(functools.partial(_read_file, storage=storage), batch_size=1)


def configured(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """Sets what holds for all that is made of this dataset, and for no other; returns it."""
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Keeps the type of an error, so that a caller can tell a corrupt file from a lost node.
    context.raise_original_map_exception = True
    return dataset


def _read_file(batch: dict[str, np.ndarray], storage: Storage) -> pa.Table:
    """Reads the one file that `batch` names; what is decoded are the very bytes whose checksum was verified."""
    try:
        data = storage.read_verified({name: str(batch[name][0]) for name in ("path", "sha256")})
    except CorruptFileError as error:
        raise CorruptShardError(*error.args) from error
    return read_table(data)


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


def to_rows(dataset: ray.data.Dataset | ray.data.DataIterator) -> Rows:
    """Collects a dataset of `read_split`, or a worker's part of it, in memory, in order of `row_id`.

    A batch is let go as soon as its rows are in their places, so that the pixels are hardly ever there twice.
    """
    with own_errors():
        batches = collections.deque(dataset.iter_batches(batch_size=_READ_ROWS))
    row_ids = np.concatenate([batch["row_id"] for batch in batches])
    order = np.argsort(row_ids)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    columns = {
        name: np.empty((len(order), *values.shape[1:]), values.dtype)
        for name, values in batches[0].items()
        if name != "row_id"
    }
    start = 0
    while batches:
        batch = batches.popleft()
        stop = start + len(batch["row_id"])
        for name, column in columns.items():
            column[places[start:stop]] = batch[name]
        start = stop
    return Rows(row_ids[order], columns["image"], columns["label"], columns.get("coarse_label"))


@contextlib.contextmanager
def own_errors(*others: type[Exception]) -> Iterator[None]:
    """Raises a ValueError, or one of `others`, that a Ray Data task raised as itself, without Ray's wrapping."""
    own: tuple[type[Exception], ...] = (ValueError, *others)
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, own):
            raise _as_raised(error.cause) from None
        raise


def _as_raised(error: Exception) -> Exception:
    """The error without the advice on retries that Ray Data adds to its first argument."""
    error.args = tuple(_ADVICE.sub("", arg) if isinstance(arg, str) else arg for arg in error.args)
    for name, value in vars(error).items():
        if isinstance(value, str):  # an error that was sent to this process was made of its arguments
            setattr(error, name, _ADVICE.sub("", value))
    return error
