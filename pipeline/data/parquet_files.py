"""Reads columns of Parquet files that strangers have made: nothing is unpickled, and no file is taken at its word.

Columns are accepted by their types, before a value is looked at, because Arrow runs the code of registered extension
types, some of which unpickle. Rows are decoded a few at a time, since a file of some kilobytes may hold gigabytes, and
counted, since a footer may claim rows that are not there.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.excerpt import excerpt
from pipeline.storage import Storage

BATCH_ROWS = 8
"""Rows that are decoded at a time, or fewer: a dictionary may make each of them as large as the largest."""
BATCH_BYTES = 64 << 20
"""What the rows of a batch may have if each is as large as the whole column of its row group."""
FEW_ROWS = 1_000_000
"""A file may claim more rows than these only if it has as many bytes."""


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column of this type has encoded images: binary, or a struct with binary `bytes` as Hugging Face has."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@contextlib.contextmanager
def open_parquet(root: Storage, file: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file and reads its footer.

    Raises:
        ValueError: if it is none, cannot be read, or claims more rows than it can have; also if what is done with it
            fails in Arrow. Names the file.
    """
    try:
        with root.filesystem.open_input_file(root.fs_path(file)) as source:
            size, parquet = source.size(), pq.ParquetFile(source)
            rows = parquet.metadata.num_rows
            groups = sum(parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups))
            if rows != groups or not 0 <= rows <= max(FEW_ROWS, size):
                raise ValueError(
                    f"{root.absolute(file)} claims {rows:,} rows, {groups:,} in its row groups, in {size:,} bytes: "
                    "write it again"
                )
            yield parquet
    # Arrow raises subclasses of these for a file that is damaged; a size that is none ends as a MemoryError.
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        raise ValueError(f"{root.absolute(file)} cannot be read as Parquet: {excerpt(error)}") from error


def check_columns(
    root: Storage, file: str, schema: pa.Schema, accepted: Mapping[str, Callable[[pa.DataType], bool]]
) -> None:
    """Checks the types of columns before anything is read; those that are not there are passed over.

    Raises:
        ValueError: if one has another type, or there are two of one name; names both.
    """
    for name, accepts in accepted.items():
        kinds = [field.type for field in schema if field.name == name]
        if len(kinds) > 1 or not all(map(accepts, kinds)):
            raise ValueError(f"{root.absolute(file)}: the column `{name}` is {', '.join(map(_name_of, kinds))}")


def row_without_value(parquet: pq.ParquetFile, column: str) -> int | None:
    """The first row in which a column of plain values is null; None if there is none, or no such column.

    Row groups whose statistics say that they have none are not read.
    """
    first = 0
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        for chunk in (group.column(i) for i in range(group.num_columns)):
            statistics = chunk.statistics
            if chunk.path_in_schema != column or (
                statistics and statistics.has_null_count and not statistics.null_count
            ):
                continue
            missing = parquet.read_row_group(number, columns=[column], use_threads=False)[column].is_null().to_numpy()
            if missing.any():
                return first + int(missing.argmax())
        first += group.num_rows
    return None


def read_rows(
    name: str, parquet: pq.ParquetFile, columns: list[str], start: int, count: int
) -> Iterator[pa.RecordBatch]:
    """The rows from `start`, `count` of them, a few at a time, from no more row groups than have them.

    Args:
        name: Name of the file in messages.

    Raises:
        ValueError: if the file has fewer.
    """
    groups, skip = _row_groups(parquet, start, start + count)
    left = count
    for batch in parquet.iter_batches(
        _batch_rows(parquet, groups, columns), row_groups=groups, columns=columns, use_threads=False
    ):
        wanted = batch.slice(skip, left)
        skip = max(0, skip - len(batch))
        left -= len(wanted)
        if len(wanted):
            yield wanted
        if not left:
            break
    if left:
        raise ValueError(
            f"{name} claims {count:,} rows from row {start:,} on, and has {count - left:,}: write it again"
        )


def _batch_rows(parquet: pq.ParquetFile, groups: list[int], columns: list[str]) -> int:
    """Rows of a batch: so few that it has at most `BATCH_BYTES`, whatever is in these columns of the row groups."""
    chunks = (
        parquet.metadata.row_group(group).column(i) for group in groups for i in range(parquet.metadata.num_columns)
    )
    sizes = [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max([1, *sizes])))


def _row_groups(parquet: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that have the rows from `start` to `stop`, and how many rows of the first come before."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = [i for i, size in enumerate(sizes) if starts[i] < stop and starts[i] + size > start]
    return groups, start - int(starts[groups[0]]) if groups else 0


def _name_of(kind: pa.DataType) -> str:
    return kind.extension_name if isinstance(kind, pa.BaseExtensionType) else excerpt(kind)
