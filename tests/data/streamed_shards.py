"""Shards of random rows for the tests of streamed reading, and a reader that notes what it reads."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.rows import Rows
from pipeline.data.shard_reader import Entry, ShardReader
from pipeline.data.shards import write_rows
from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import Storage


def write_shards(storage: Storage, counts: list[int], shape: tuple[int, int, int]) -> tuple[Rows, list[dict[str, Any]]]:
    """All rows in the order of the shards, whose labels and ids are their positions, and the entries of the shards."""
    total = sum(counts)
    images = np.random.default_rng(1).integers(0, 256, (total, *shape), dtype=np.uint8)
    rows = Rows.of(images, np.arange(total, dtype=np.int32))
    stops = np.cumsum(counts)
    parts = [rows.take(slice(stop - count, stop)) for count, stop in zip(counts, stops.tolist(), strict=True)]
    return rows, [write_rows(part, storage, f"train/{number:05d}.parquet") for number, part in enumerate(parts)]


@dataclass(frozen=True)
class NotingReader(ShardReader):
    """Notes the paths of the shards that it reads."""

    read_paths: list[str] = field(default_factory=list)

    def read(self, entry: Entry) -> Rows:
        self.read_paths.append(entry["path"])
        return super().read(entry)


def streamed(
    reader: ShardReader, shards: list[dict[str, Any]], shape: tuple[int, int, int], depth: int
) -> StreamedRows:
    """With a window of `depth` of the largest shards."""
    window = depth * max(shard["rows"] for shard in shards) * int(np.prod(shape))
    return StreamedRows(reader, shards, shape, window)
