"""Columns of tensors that Ray Data has written to Parquet: lists of values, and one shape in the column's metadata.

They are read as lists, so that neither Ray nor what it would unpickle is needed.
"""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EXTENSIONS = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_NAME, _PARAMETERS = b"ARROW:extension:name", b"ARROW:extension:metadata"


def tensor_shape(field: pa.Field) -> tuple[int, ...] | None:
    """Shape of the tensors of a column that Ray Data has written as uint8; None of any other column."""
    kind, metadata = field.type, field.metadata or {}
    if isinstance(kind, pa.BaseExtensionType):  # in a process that has imported Ray Data
        name, shape, kind = kind.extension_name, getattr(kind, "shape", None), kind.storage_type
    else:
        name = metadata.get(_NAME, b"").decode(errors="replace")
        try:
            shape = json.loads(metadata.get(_PARAMETERS, b""))
        except (ValueError, RecursionError):
            return None
    if name not in EXTENSIONS or not isinstance(shape, list | tuple):
        return None
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or kind.value_type != pa.uint8() or not all(type(size) is int and size > 0 for size in shape):
        return None
    return tuple(shape)


def tensor_pixels(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """The tensors of a column of `tensor_shape`, uint8 (N, ...); those that are null are black.

    Raises:
        ValueError: if a row has not as many values as the shape.
    """
    storage = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    there = column.is_valid().to_numpy()
    sizes = np.concatenate([np.zeros(0), *(pc.list_value_length(chunk).drop_null().to_numpy() for chunk in storage)])
    if (sizes != math.prod(shape)).any():
        raise ValueError(f"some rows have not the {math.prod(shape):,} values that the shape {shape} needs")
    pixels = np.zeros((len(column), *shape), np.uint8)
    values = [chunk.flatten().to_numpy() for chunk in storage]
    pixels[there] = np.concatenate([np.zeros(0, np.uint8), *values]).reshape(-1, *shape)
    return pixels
