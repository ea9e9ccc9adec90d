"""The Parquet files in which rows are kept.

A file holds `row_id` int64 (index of the row in the source's split), `image` as fixed-width binary of H * W * C bytes
with the shape in the metadata of the schema, `label` int32 and, where the source has one, `coarse_label` int32. Files
of earlier versions hold `image` as uint8 in Arrow's fixed-shape tensor [H, W, C], which is read twenty times as
slowly; they are read too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.rows import Rows
from pipeline.storage import Storage

MOST_SHARD_BYTES = 16 * 2**20
"""Pixels of a shard; a worker that streams holds a few shards at a time."""
MOST_VALIDATION_SHARD_BYTES = 4 * 2**20
"""Pixels of a shard of validation rows, of which a worker that streams keeps two or three beside its window."""
_SHAPE = b"image_shape"


def shard_count(rows: int, least: int, row_bytes: int, most_bytes: int | None = None) -> int:
    """Number of shards of so many rows: `least`, or more so that none has over `most_bytes` of pixels.

    `most_bytes` is `MOST_SHARD_BYTES` if it is not given.
    """
    rows_of_shard = max(1, (most_bytes or MOST_SHARD_BYTES) // row_bytes)
    return min(max(least, -(-rows // rows_of_shard)), rows)


def write_rows(rows: Rows, storage: Storage, path: str) -> dict[str, Any]:
    """Writes rows as one Parquet file, the same bytes for the same rows.

    Returns:
        The manifest entry of the file, `{path, rows, sha256}`.
    """
    pixels = np.ascontiguousarray(rows.images).reshape(len(rows), -1).view(np.uint8)
    width = pa.binary(pixels.shape[1])
    columns = {
        "row_id": pa.array(rows.row_ids, pa.int64()),
        "image": pa.FixedSizeBinaryArray.from_buffers(width, len(rows), [None, pa.py_buffer(pixels)]),
        "label": pa.array(rows.labels, pa.int32()),
    }
    if rows.coarse_labels is not None:
        columns["coarse_label"] = pa.array(rows.coarse_labels, pa.int32())
    table = pa.table(columns).replace_schema_metadata({_SHAPE: json.dumps(rows.image_shape)})
    sink = pa.BufferOutputStream()
    others = [name for name in columns if name != "image"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=others, write_statistics=others)
    return {"rows": len(rows)} | storage.write_verified(path, sink.getvalue().to_pybytes())


def read_rows(entry: Mapping[str, Any], storage: Storage) -> Rows:
    """The rows of one file, from its manifest entry.

    Raises:
        CorruptFileError: if the file is missing or has other bytes than the entry names.
    """
    return from_table(read_table(storage.read_verified(entry)))


def read_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a shard's bytes, with the images as a fixed-shape tensor whichever way they are kept.

    Args:
        data: The whole file.
        columns: Names of the columns to read; those that it lacks are left out. None reads all.
    """
    return with_tensors(pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False))


def with_tensors(table: pa.Table) -> pa.Table:
    """A table read from a shard with its images as a fixed-shape tensor; any other table as it is."""
    metadata = table.schema.metadata or {}
    if _SHAPE not in metadata or "image" not in table.column_names:
        return table
    shape, position = json.loads(metadata[_SHAPE]), table.column_names.index("image")
    size = int(np.prod(shape))
    if table.schema.field(position).type != pa.binary(size):
        return table  # no bytes of one pixel each: whoever expects images says what he has found
    parts = [_tensor(part, shape, size) for part in table["image"].chunks]
    tensor = pa.fixed_shape_tensor(pa.uint8(), shape)
    return table.set_column(position, "image", pa.chunked_array(parts, tensor)).replace_schema_metadata(None)


def pixel_shape(schema: pa.Schema) -> tuple[int, ...] | None:
    """Shape of the images of a table that has them as uint8 pixels, in either way; None of any other table."""
    kind = schema.field("image").type
    if isinstance(kind, pa.FixedShapeTensorType):
        # Bytes that lie in another order than the shape says would be taken for another image.
        in_order = kind.permutation in (None, list(range(len(kind.shape))))
        return tuple(kind.shape) if kind.value_type == pa.uint8() and in_order else None
    try:
        shape = json.loads((schema.metadata or {})[_SHAPE])
    except (KeyError, ValueError, RecursionError):
        return None
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        return None
    size = math.prod(shape)
    return tuple(shape) if pa.types.is_fixed_size_binary(kind) and kind.byte_width == size else None


def _tensor(images: pa.FixedSizeBinaryArray, shape: list[int], size: int) -> pa.FixedShapeTensorArray:
    """The same bytes under another type."""
    buffers = [None, images.buffers()[1]]
    pixels = pa.Array.from_buffers(pa.uint8(), len(images) * size, buffers, offset=images.offset * size)
    values = pa.FixedSizeListArray.from_arrays(pixels, size)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), values)


def from_table(table: pa.Table) -> Rows:
    """The rows of a table with the columns of a shard and its images as a fixed-shape tensor."""
    coarse = table["coarse_label"].to_numpy() if "coarse_label" in table.column_names else None
    images = table["image"].combine_chunks().to_numpy_ndarray()
    return Rows(table["row_id"].to_numpy(), images, table["label"].to_numpy(), coarse)
