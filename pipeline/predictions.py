"""The logits of a split in storage, read only if their bytes are those that a manifest names.

A Parquet file in order of `row_id`: `row_id` int64 (index of the row in its source), `label` int32 and `logits`, K
float32 numbers. Logits and not probabilities: a temperature can still be fitted to them.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage


@dataclass(frozen=True)
class Predictions:
    """What a model says of the rows of a split."""

    row_ids: np.ndarray
    """int64 (N,)."""
    labels: np.ndarray
    """int32 (N,)."""
    logits: np.ndarray
    """float32 (N, K)."""


def write_predictions(predictions: Predictions, storage: Storage, path: str) -> dict[str, Any]:
    """Writes them to `path`; returns what a manifest says of them: `{path, sha256, rows}`."""
    logits = pa.FixedSizeListArray.from_arrays(
        pa.array(predictions.logits.reshape(-1), pa.float32()), predictions.logits.shape[1]
    )
    columns = {
        "row_id": pa.array(predictions.row_ids, pa.int64()),
        "label": pa.array(predictions.labels, pa.int32()),
        "logits": logits,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return write_verified(sink.getvalue().to_pybytes(), storage, path) | {"rows": len(predictions.labels)}


def read_predictions(entry: dict[str, Any], storage: Storage) -> Predictions:
    """What `write_predictions` wrote, from its manifest entry.

    Raises:
        ValueError: if the bytes are not those that were written.
    """
    table = pq.read_table(pa.BufferReader(read_verified(entry, storage)))
    logits = table["logits"].combine_chunks()
    return Predictions(
        table["row_id"].to_numpy(), table["label"].to_numpy(), logits.flatten().to_numpy().reshape(len(logits), -1)
    )


def write_verified(data: bytes, storage: Storage, path: str) -> dict[str, Any]:
    """Writes a file; returns `{path, sha256}`, by which `read_verified` reads it."""
    storage.write_bytes(path, data)
    return {"path": path, "sha256": hashlib.sha256(data).hexdigest()}


def read_verified(entry: dict[str, Any], storage: Storage) -> bytes:
    """The bytes of a file that `write_verified` wrote.

    Raises:
        ValueError: if they are others.
    """
    data = storage.read_bytes(entry["path"])
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise ValueError(
            f"{storage.absolute(entry['path'])} has SHA-256 {found}; expected {entry['sha256']}: run the task that "
            "wrote it again with --force"
        )
    return data
