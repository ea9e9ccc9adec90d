"""Brings rows from the files of `ingest` to the shards of `preprocess`, which are samples of all of them.

Ray tasks read the files and cut their rows into parts, one for each group of shards; other tasks gather the parts of a
group and write its shards. What a task cuts or gathers is as large as it can hold, since every pair of the two is an
object for which the calling process keeps a reference: N GiB of rows make at most (4 N)^2 of them. (Ray Data's
`groupby`, with a block a file and a group a shard, keeps 21 kB for each pair: 7.8 GB for 8.6 GB of rows.) Rows that do
not fit Ray's object store are spilled to the disk of the host, once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray

from pipeline.data.rows import Rows

T = TypeVar("T")
File = tuple[Mapping[str, Any], int]
"""Manifest entry of a file, and the number of its target."""
_LEAST_BYTES, _MOST_BYTES = 16 * 2**20, 256 * 2**20
"""Of the pixels of the rows that a task cuts or gathers."""


@dataclass(frozen=True)
class Target:
    """Where the rows of a split of the source go, by row id; int64 (N,) each."""

    shard: np.ndarray
    place: np.ndarray
    """Position in the shard."""


@dataclass(frozen=True)
class _Part:
    rows: Rows
    shard: np.ndarray
    place: np.ndarray


def exchange(
    files: Sequence[File],
    read: Callable[[Mapping[str, Any]], Rows],
    targets: Sequence[Target],
    shard_rows: Sequence[int],
    row_bytes: int,
    write: Callable[[int, Rows], T],
    on_cut: Callable[[int], None] = lambda rows: None,
) -> Iterator[T]:
    """Reads files and writes shards, in tasks of the cluster.

    Args:
        files: Their rows are those of all shards together.
        read: Gives the rows of a file.
        targets: Where the rows go.
        shard_rows: Number of rows of each shard.
        row_bytes: Bytes of the pixels of a row.
        write: Gets the number of a shard and its rows in order; what it returns is small.
        on_cut: Called with the number of rows that have just been read and cut.

    Yields:
        What `write` returns for each shard, in any order.
    """
    total = sum(shard_rows) * row_bytes
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(max(total // (2 * cpus), _LEAST_BYTES), _MOST_BYTES)
    count = -(-total // size)
    groups = np.array_split(np.arange(len(shard_rows)), min(count, len(shard_rows)))
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    shared = ray.put((list(targets), group_of))
    cut: Any = ray.remote(num_cpus=1, num_returns=len(groups) + 1)(_cut)
    bounds = np.linspace(0, len(files), min(count, len(files)) + 1).astype(int)
    cuts = [cut.remote(shared, read, files[bounds[i] : bounds[i + 1]]) for i in range(len(bounds) - 1)]
    for rows in _as_they_end([rows for rows, *_ in cuts]):
        on_cut(rows)
    gather: Any = ray.remote(num_cpus=1)(_gather)
    own = [{int(shard): int(shard_rows[shard]) for shard in group} for group in groups]
    written = [gather.remote(own[number], write, *(parts[number + 1] for parts in cuts)) for number in range(len(own))]
    del cuts  # so that the parts of a group are released once it is gathered
    for results in _as_they_end(written):
        yield from results


def _as_they_end(pending: list[Any]) -> Iterator[Any]:
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        yield ray.get(done[0])


def _cut(
    shared: tuple[list[Target], np.ndarray], read: Callable[[Mapping[str, Any]], Rows], files: Sequence[File]
) -> list[Any]:
    """The number of rows in the files, and their rows by the group of shards that they go to."""
    targets, group_of = shared
    pieces: list[list[_Part]] = [[] for _ in range(int(group_of[-1]) + 1)]
    count = 0
    for entry, number in files:
        rows, target = read(entry), targets[number]
        count += len(rows)
        shard, place = target.shard[rows.row_ids], target.place[rows.row_ids]
        group = group_of[shard]
        order = np.argsort(group, kind="stable")
        for found, piece in enumerate(np.split(order, np.searchsorted(group[order], np.arange(1, len(pieces))))):
            pieces[found].append(_Part(rows.take(piece), shard[piece], place[piece]))
    return [count, *pieces]


def _gather(shard_rows: dict[int, int], write: Callable[[int, Rows], T], *parts: list[_Part]) -> list[T]:
    """Writes the shards of a group, one after the other."""
    flat = [part for piece in parts for part in piece]
    return [write(shard, _shard(shard, count, flat)) for shard, count in shard_rows.items()]


def _shard(shard: int, count: int, parts: list[_Part]) -> Rows:
    like = parts[0].rows
    row_ids, labels = np.empty(count, np.int64), np.empty(count, np.int32)
    images = np.empty((count, *like.image_shape), np.uint8)
    coarse = None if like.coarse_labels is None else np.empty(count, np.int32)
    for part in parts:
        own = np.flatnonzero(part.shard == shard)
        to = part.place[own]
        row_ids[to], images[to], labels[to] = part.rows.row_ids[own], part.rows.images[own], part.rows.labels[own]
        if coarse is not None and part.rows.coarse_labels is not None:
            coarse[to] = part.rows.coarse_labels[own]
    return Rows(row_ids, images, labels, coarse)
