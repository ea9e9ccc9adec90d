"""The Parquet files in which rows are kept.

A file holds `row_id` int64 (index of the row in the source's split), `image` uint8 as Arrow's fixed-shape tensor
[H, W, C], `label` int32 and, where the source has one, `coarse_label` int32.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.rows import Rows
from pipeline.storage import Storage


def write_rows(rows: Rows, storage: Storage, path: str) -> dict[str, Any]:
    """Writes rows as one Parquet file, the same bytes for the same rows.

    Returns:
        The manifest entry of the file, `{path, rows, sha256}`.
    """
    columns = {
        "row_id": pa.array(rows.row_ids, pa.int64()),
        "image": pa.FixedShapeTensorArray.from_numpy_ndarray(rows.images),
        "label": pa.array(rows.labels, pa.int32()),
    }
    if rows.coarse_labels is not None:
        columns["coarse_label"] = pa.array(rows.coarse_labels, pa.int32())
    sink = pa.BufferOutputStream()
    # Parquet has no uint8 and stores each pixel in four bytes; dictionary encoding, the default, makes it one again.
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return {"rows": len(rows)} | storage.write_verified(path, sink.getvalue().to_pybytes())


def read_rows(entry: Mapping[str, Any], storage: Storage) -> Rows:
    """The rows of one file, from its manifest entry.

    Raises:
        CorruptFileError: if the file is missing or has other bytes than the entry names.
    """
    return from_table(pq.read_table(pa.BufferReader(storage.read_verified(entry))))


def from_table(table: pa.Table) -> Rows:
    """The rows of a table with the columns of a shard."""
    coarse = table["coarse_label"].to_numpy() if "coarse_label" in table.column_names else None
    images = table["image"].combine_chunks().to_numpy_ndarray()
    return Rows(table["row_id"].to_numpy(), images, table["label"].to_numpy(), coarse)
