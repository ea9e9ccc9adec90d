"""Rows that are cut and gathered in several tasks arrive in their shards, each at its place."""

import numpy as np
import pytest

from pipeline.data import exchange
from pipeline.data.exchange import Target
from pipeline.data.rows import Rows, rows_digest

SHAPE = (4, 3, 2)
SHARDS = [30, 1, 45, 24, 60, 40]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("least_bytes", [480, 1200, exchange._LEAST_BYTES], ids=["ten", "four", "one"])
def test_every_row_arrives_at_its_place(least_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LEAST_BYTES", least_bytes)
    monkeypatch.setattr(exchange, "_MOST_BYTES", least_bytes)
    rng = np.random.default_rng(0)
    sources = []
    for count in (170, 30):  # two splits of the source, with row ids of their own
        images = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        labels = np.arange(count, dtype=np.int32)
        sources.append(Rows(np.arange(count), images, labels, labels // 10))
    shard_of = rng.permutation(np.repeat(np.arange(len(SHARDS)), SHARDS))
    place_of = np.empty(200, np.int64)
    for shard, count in enumerate(SHARDS):
        place_of[shard_of == shard] = rng.permutation(count)
    targets = [Target(shard_of[:170], place_of[:170]), Target(shard_of[170:], place_of[170:])]
    parts = [
        (rows.take(piece), i)
        for i, rows in enumerate(sources)
        for piece in np.array_split(rng.permutation(len(rows)), 7)
    ]
    files = [({"path": str(number)}, target) for number, (_, target) in enumerate(parts)]
    cut: list[int] = []
    found = dict(
        exchange.exchange(
            files,
            lambda entry: parts[int(entry["path"])][0],
            targets,
            SHARDS,
            int(np.prod(SHAPE)),
            lambda shard, rows: (shard, rows),
            cut.append,
        )
    )
    assert sum(cut) == 200
    for shard, count in enumerate(SHARDS):
        expected: list[Rows] = [sources[0].take(slice(0, 0))] * count
        for rows, target in zip(sources, targets, strict=True):
            for row in np.flatnonzero(target.shard == shard):
                expected[target.place[row]] = rows.take(slice(row, row + 1))
        columns = [np.concatenate([getattr(row, name) for row in expected]) for name in vars(expected[0])]
        assert rows_digest(found[shard]) == rows_digest(Rows(*columns))
        np.testing.assert_array_equal(found[shard].row_ids, columns[0])
