"""Brings rows from the files of `ingest` to the shards of `preprocess`, which are samples of all of them.

Ray tasks cut the rows that were read into parts, one for each group of shards, and other tasks gather the parts of a
group. What is cut and what is gathered are as large as a task can hold, since every pair of the two is an object for
which the calling process keeps a reference: N GiB of rows make at most (4 N)^2 of them. (Ray Data's `groupby`, with a
block a file and a group a shard, keeps 21 kB for each pair: 7.8 GB for 8.6 GB of rows.) Rows that do not fit Ray's
object store are spilled to the disk of the host, once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from pipeline.data.rows import Rows
from pipeline.data.shards import from_table

T = TypeVar("T")
_LEAST_BYTES, _MOST_BYTES = 16 * 2**20, 256 * 2**20
"""Of the rows that a task cuts or gathers."""


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
    blocks: list[tuple["ray.ObjectRef[pa.Table]", int]],
    targets: Sequence[Target],
    shard_rows: Sequence[int],
    row_bytes: int,
    write: Callable[[int, Rows], T],
) -> Iterator[T]:
    """Calls `write` with the number and the rows of each shard, in tasks of the cluster.

    Args:
        blocks: Tables of rows, each with the index of its target. They are released as they are cut.
        targets: Where the rows go.
        shard_rows: Number of rows of each shard; together those of all blocks.
        row_bytes: Bytes of the pixels of a row.
        write: Gets the rows of a shard in order; what it returns is small.

    Yields:
        What `write` returns for each shard, in any order.
    """
    total = sum(shard_rows) * row_bytes
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(max(total // (2 * cpus), _LEAST_BYTES), _MOST_BYTES)
    count = -(-total // size)
    groups = np.array_split(np.arange(len(shard_rows)), min(count, len(shard_rows)))
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    per_cut = -(-len(blocks) // count)
    shared = ray.put((list(targets), group_of))
    cut = ray.remote(num_cpus=1, num_returns=len(groups))(_cut)
    parts: list[list[Any]] = []
    while blocks:
        taken = [blocks.pop() for _ in range(min(per_cut, len(blocks)))]
        made = cut.remote(shared, [target for _, target in taken], *(block for block, _ in taken))
        parts.append([made] if len(groups) == 1 else made)
        del taken
    gather: Any = ray.remote(num_cpus=1)(_gather)
    own = [{int(shard): int(shard_rows[shard]) for shard in group} for group in groups]
    pending = [gather.remote(own[number], write, *column) for number, column in enumerate(zip(*parts, strict=True))]
    del parts
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        yield from ray.get(done[0])


def _cut(shared: tuple[list[Target], np.ndarray], targets: list[int], *blocks: pa.Table) -> Any:
    """The rows of the blocks by the group of shards that they go to."""
    all_targets, group_of = shared
    pieces: list[list[_Part]] = [[] for _ in range(int(group_of[-1]) + 1)]
    for number, block in zip(targets, blocks, strict=True):
        rows, target = from_table(block), all_targets[number]
        shard, place = target.shard[rows.row_ids], target.place[rows.row_ids]
        group = group_of[shard]
        order = np.argsort(group, kind="stable")
        for found, piece in enumerate(np.split(order, np.searchsorted(group[order], np.arange(1, len(pieces))))):
            pieces[found].append(_Part(rows.take(piece), shard[piece], place[piece]))
    return pieces if len(pieces) > 1 else pieces[0]


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
