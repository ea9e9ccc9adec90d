"""The logits of a split as a Parquet file in storage, verified against the SHA-256 in a manifest when read.

The rows are in order of `row_id` and have the columns `row_id` int64 (index of the row in its source), `label` int32
and `logits`, a fixed-size list of K float32. Logits are stored rather than probabilities, so that a temperature can
still be fitted to them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage


@dataclass(frozen=True)
class Predictions:
    """The logits of a model for all rows of a split."""

    row_ids: np.ndarray
    """int64 (N,)."""
    labels: np.ndarray
    """int32 (N,)."""
    logits: np.ndarray
    """float32 (N, K)."""


def write_predictions(predictions: Predictions, storage: Storage, path: str) -> dict[str, Any]:
    """Writes predictions to `path`; returns their manifest entry `{path, sha256, rows}`."""
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
    return storage.write_verified(path, sink.getvalue().to_pybytes()) | {"rows": len(predictions.labels)}


def read_predictions(entry: dict[str, Any], storage: Storage) -> Predictions:
    """Reads what `write_predictions` wrote, from its manifest entry.

    Raises:
        CorruptFileError: if the file is missing or has other bytes.
    """
    table = pq.read_table(pa.BufferReader(storage.read_verified(entry)))
    logits = table["logits"].combine_chunks()
    return Predictions(
        table["row_id"].to_numpy(), table["label"].to_numpy(), logits.flatten().to_numpy().reshape(len(logits), -1)
    )
