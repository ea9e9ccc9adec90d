"""The order of streamed rows: every row once, whatever the shards, the number of workers and the step of a start."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from pipeline.data.order import MIB, StreamOrder, epoch_order, fits_window
from pipeline.data.rows import Rows

WORKERS = (1, 2, 3, 4, 8)


def layouts() -> Iterator[tuple[StreamOrder, int]]:
    """Orders of random shards, and the rows of each; small ones, so that lanes have few pieces or parts of one."""
    rng = np.random.default_rng(0)
    for _ in range(24):
        shards = rng.integers(1, 70, rng.integers(3, 60)).tolist()
        size = int(rng.choice([6, 12, 16, 24, 48]))
        if sum(shards) >= 2 * size:
            yield StreamOrder.of(shards, 1, size, int(rng.integers(2, 60)) * max(shards), seed=7), sum(shards)


def batches(order: StreamOrder, epoch: int, rank: int = 0, num_workers: int = 1, step: int = 0) -> list[np.ndarray]:
    """The rank's slice of each global batch of an epoch: numbers of the rows over all shards, int64."""
    share, count = order.batch_size // num_workers, order.rows_of_lane
    own = slice(rank * share, (rank + 1) * share)
    numbers = order.lanes_of(own)
    starts = np.concatenate([[0], np.cumsum(order.shard_rows)])
    lanes = []
    for lane in order.epoch(epoch)[numbers.start : numbers.stop]:
        shard_of = np.array([piece.shard for piece in lane.pieces], np.int64)
        found = np.concatenate([rows for _, rows in lane.slots(step * count)])
        lanes.append(starts[shard_of[found[:, 0]]] + found[:, 1])
    place = own.start - numbers.start * count
    whole = [np.concatenate([lane[i * count : (i + 1) * count] for lane in lanes]) for i in range(order.steps - step)]
    return [batch[place : place + share] for batch in whole]


def test_every_row_occurs_once_and_the_remainder_is_left_out() -> None:
    left_out = set()
    for order, rows in layouts():
        for epoch in (0, 3):
            seen = batches(order, epoch)
            assert len(seen) == rows // order.batch_size
            assert {len(batch) for batch in seen} == {order.batch_size}
            flat = np.concatenate(seen)
            assert len(np.unique(flat)) == len(flat)
            assert 0 <= flat.min() <= flat.max() < rows
            left_out.add(tuple(np.setdiff1d(np.arange(rows), flat)))
    assert len(left_out) > 30, "other rows in every epoch"


@pytest.mark.parametrize("num_workers", WORKERS)
def test_global_batches_do_not_depend_on_workers_nor_on_the_step_of_a_start(num_workers: int) -> None:
    rng = np.random.default_rng(num_workers)
    for order, _ in islice((found for found in layouts() if found[0].batch_size % num_workers == 0), 6):
        expected = batches(order, 1)
        for step in (0, int(rng.integers(order.steps)), order.steps - 1):
            ranks = [batches(order, 1, rank, num_workers, step) for rank in range(num_workers)]
            for at, parts in enumerate(zip(*ranks, strict=True)):
                np.testing.assert_array_equal(np.concatenate(parts), expected[step + at])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = StreamOrder.of([50] * 20, 1, 16, 400, seed=3)
    again, other = StreamOrder.of([50] * 20, 1, 16, 400, seed=3), StreamOrder.of([50] * 20, 1, 16, 400, seed=4)
    first = np.concatenate(batches(order, 0))
    np.testing.assert_array_equal(first, np.concatenate(batches(again, 0)))
    assert (first == np.concatenate(batches(order, 1))).mean() < 0.02
    assert (first == np.concatenate(batches(other, 0))).mean() < 0.02


def test_a_slot_mixes_the_shards_of_its_window_alike() -> None:
    """Of 64 shards, 8 lanes mix 4 each: once a window is full, a batch has rows of most of the 32 shards in it."""
    order = StreamOrder.of([400] * 64, 1, 64, 400 * 32, seed=0)
    assert (order.lanes, order.depth) == (8, 4)
    seen = batches(order, 0)
    shards = [len(np.unique(batch // 400)) for batch in seen]
    assert np.mean(shards[100:300]) > 27.8, "as many as 64 draws from 32 shards hit on average, or more"
    reach = [max(np.bincount(batch // 400)) for batch in seen[100:300]]
    assert np.mean(reach) < 6, "no shard fills a batch"


@pytest.mark.parametrize(
    ("size", "window", "lanes", "depth"),
    [
        (128, 1000, 16, 6),
        (128, 320, 16, 2),
        (128, 319, 8, 3),  # two shards in each of 16 lanes have no room
        (128, 20, 1, 2),
        (64, 1000, 8, 12),  # a lane gives at least 8 rows to a batch
        (100, 1000, 4, 25),
        (127, 1000, 1, 100),
        (12, 1000, 1, 100),
    ],
)
def test_the_window_is_divided_among_lanes(size: int, window: int, lanes: int, depth: int) -> None:
    order = StreamOrder.of([10, 9, 10] * 40, 1, size, window, seed=0)
    assert (order.lanes, order.depth) == (lanes, depth)
    assert order.lanes * order.depth * 10 <= window


def test_a_window_without_room_for_two_shards_is_refused_with_the_size_that_would_do() -> None:
    with pytest.raises(
        ValueError, match=r"shuffle_window_mb = 3 has .* 2\.4 MiB .* give at least 5, or more data"
    ) as e:
        StreamOrder.of([200, 204], 12288, 64, 3 * MIB, seed=0)
    enough = int(str(e.value).partition("at least ")[2].partition(",")[0])
    assert StreamOrder.of([200, 204], 12288, 64, enough * MIB, seed=0).depth == 2


def test_what_fits_the_window_is_permuted_as_a_whole() -> None:
    assert fits_window(45_000, (32, 32, 3), 132)
    assert not fits_window(45_000, (32, 32, 3), 131)
    rows = Rows(np.arange(37), np.zeros((37, 2, 2, 1), np.uint8), np.arange(37, dtype=np.int32))
    found = rows.global_batches(8, 5, slice(0, 8), epoch=2, step=1)
    for epoch, step, batch in islice(found, 7):
        # The order that recorded results have, written out.
        expected = np.random.default_rng([5, epoch]).permutation(37)
        np.testing.assert_array_equal(epoch_order(37, 5, epoch), expected)
        np.testing.assert_array_equal(batch.take(slice(0, 8)).labels, expected[step * 8 : step * 8 + 8])
        assert batch.groups == 1
    assert (epoch, step) == (3, 3)


def test_lanes_divide_the_batch() -> None:
    for size in range(1, 200):
        order = StreamOrder.of([10] * 300, 1, size, 3000, seed=0)
        assert size % order.lanes == 0
        assert order.lanes == 1 or (order.lanes <= math.gcd(size, 16) and size / order.lanes >= 8)
