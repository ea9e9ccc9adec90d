"""The rows of a split that is read from its shards as the training goes on, in the order of `StreamOrder`.

With L = lanes of the rank, D = shards of a lane that are mixed and one shard ahead a lane, a reader holds at most
L * (D + 1) shards and the two that it is reading.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.order import Lane, StreamOrder
from pipeline.data.rows import GlobalBatch, Rows
from pipeline.data.shard_reader import Entry, ReadAhead, ShardReader

Place = tuple[Rows, int]
"""Rows of a shard, and the position of a row in them."""


class StreamedRows:
    """The rows of a split; satisfies `RowSource`.

    Args:
        reader: Reads a shard.
        shards: Manifest entries of the shards, `{path, rows, sha256}`.
        image_shape: Height, width, channels.
        window_bytes: Bytes of the pixels that are mixed at a time.
    """

    def __init__(
        self, reader: ShardReader, shards: Sequence[Entry], image_shape: tuple[int, int, int], window_bytes: int
    ) -> None:
        self._reader, self._shards, self._window_bytes = reader, shards, window_bytes
        self.image_shape = image_shape
        self.failure: Exception | None = None
        """What reading a shard has raised; a library that calls the iterators may have wrapped it."""

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self._shards)

    def order(self, size: int, seed: int) -> StreamOrder:
        """The order in which the rows are trained in global batches of this size.

        Raises:
            ValueError: if the window is too small for these shards; names the size that would do.
        """
        rows = [shard["rows"] for shard in self._shards]
        return StreamOrder.of(rows, int(np.prod(self.image_shape)), size, self._window_bytes, seed)

    def global_batches(
        self, size: int, seed: int, own: slice, *, epoch: int, step: int
    ) -> Iterator[tuple[int, int, GlobalBatch]]:
        """See `RowSource`; the groups of a batch are its lanes.

        Raises:
            CorruptFileError: if a shard is missing or has other bytes.
            ShardUnavailableError: if the store does not answer; names the object.
        """
        order = self.order(size, seed)
        lanes, count = order.lanes_of(own), order.rows_of_lane
        ahead = ReadAhead(self._reader, self._schedule(order, lanes, epoch, step), ahead=len(lanes))
        try:
            while True:
                readers = [_LaneReader(lane, step * count, ahead.next) for lane in _lanes(order, lanes, epoch)]
                for batch in range(step, order.steps):
                    places = [place for reader in readers for place in reader.take(count)]
                    yield epoch, batch, _StreamedBatch(places, lanes.start * count, order.lanes)
                    places.clear()  # whoever still has the batch shall not keep its shards
                epoch, step = epoch + 1, 0
        except Exception as error:
            self.failure = error
            raise
        finally:
            ahead.close()

    def _schedule(self, order: StreamOrder, lanes: range, epoch: int, step: int) -> Iterator[Entry]:
        """The shards in the order in which `_LaneReader.take` asks for them, over all epochs."""
        count = order.rows_of_lane
        while True:
            needed = []
            for number, lane in enumerate(_lanes(order, lanes, epoch)):
                place = step * count
                for piece in range(lane.window(lane.slot_at(place)).start, len(lane.pieces)):
                    first = max(place, int(lane.starts[piece]))  # piece i comes with slot i
                    if first < order.steps * count:  # else it has rows of the remainder only
                        needed.append((first // count, number, piece, lane.pieces[piece].shard))
            for *_, shard in sorted(needed):
                yield self._shards[shard]
            epoch, step = epoch + 1, 0

    def in_order(self, bounds: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of the rows in the order of the manifest, again and again without end.

        Args:
            bounds: int64 (batches, 2), ascending: first row of each batch, and one past the last.

        Yields:
            Images uint8 (b, H, W, C) and labels int32 (b,).

        Raises:
            CorruptFileError, ShardUnavailableError: as `global_batches`.
        """
        ahead = ReadAhead(self._reader, itertools.cycle(self._shards), ahead=1)
        try:
            while True:
                yield from self._once(bounds, ahead)
        except Exception as error:
            self.failure = error
            raise
        finally:
            ahead.close()

    def _once(self, bounds: np.ndarray, ahead: ReadAhead) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        waiting, parts, start = deque(bounds.tolist()), [], 0
        for entry in self._shards:
            shard = ahead.next()
            end = start + entry["rows"]
            while waiting:
                first, stop = waiting[0]
                parts.append(shard.take(slice(max(first - start, 0), max(stop - start, 0))))
                if stop > end:
                    break
                yield np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
                waiting.popleft()
                parts = []
            start = end


def _lanes(order: StreamOrder, lanes: range, epoch: int) -> list[Lane]:
    return order.epoch(epoch)[lanes.start : lanes.stop]


class _LaneReader:
    """The rows of a lane from a place on, each as the rows that hold it and its position in them."""

    def __init__(self, lane: Lane, place: int, read_next: Callable[[], Rows]) -> None:
        self._lane, self._slots, self._read_next = lane, lane.slots(place), read_next
        self._window: dict[int, Rows] = {}
        self._left: deque[Place] = deque()

    def take(self, count: int) -> list[Place]:
        while len(self._left) < count:
            slot, rows = next(self._slots)
            window = self._lane.window(slot)
            if self._left:  # the rest of a slot, whose first shard is not to be kept for it
                rest = _gather(list(self._left), self._left[0][0])
                self._left = deque((rest, position) for position in range(len(rest)))
            self._window = {piece: shard for piece, shard in self._window.items() if piece in window}
            for piece in window:
                if piece not in self._window:
                    self._window[piece] = self._read_next()
            self._left.extend((self._window[piece], row) for piece, row in rows.tolist())
        return [self._left.popleft() for _ in range(count)]


@dataclass(frozen=True)
class _StreamedBatch:
    """Can be used until the next one is asked for."""

    places: list[Place]
    """The rows of the rank's lanes."""
    first: int
    """Position in the global batch of the first of them."""
    groups: int

    def take(self, positions: np.ndarray | slice) -> Rows:
        if isinstance(positions, slice):
            positions = np.arange(positions.start, positions.stop)
        return _gather([self.places[position] for position in (positions - self.first).tolist()], self.places[0][0])


def _gather(places: list[Place], like: Rows) -> Rows:
    """Copies single rows; `like` says what a row consists of."""
    images = np.empty((len(places), *like.image_shape), np.uint8)
    for number, (rows, position) in enumerate(places):
        images[number] = rows.images[position]
    row_ids = np.array([rows.row_ids[position] for rows, position in places], np.int64)
    labels = np.array([rows.labels[position] for rows, position in places], np.int32)
    if like.coarse_labels is None:
        return Rows(row_ids, images, labels)
    coarse = [rows.coarse_labels[position] for rows, position in places if rows.coarse_labels is not None]
    return Rows(row_ids, images, labels, np.array(coarse, np.int32))
