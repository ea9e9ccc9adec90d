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
                    picked = _Picked.joined([reader.take(count) for reader in readers])
                    yield epoch, batch, _StreamedBatch(picked, lanes.start * count, order.lanes)
                    picked.shards.clear()  # whoever still has the batch shall not keep its shards
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


@dataclass(frozen=True)
class _Picked:
    """Rows that lie in several shards."""

    shards: list[Rows]
    places: np.ndarray
    """int64 (n, 2): for each row the number of its shard and its position there."""

    @classmethod
    def joined(cls, parts: Sequence[_Picked]) -> _Picked:
        """The rows of all parts, one part after another."""
        starts = itertools.accumulate((len(part.shards) for part in parts[:-1]), initial=0)
        places = [part.places + np.array([start, 0]) for start, part in zip(starts, parts, strict=True)]
        return cls([shard for part in parts for shard in part.shards], np.concatenate(places))

    def rows(self) -> Rows:
        """A copy of the rows."""
        count, like = len(self.places), self.shards[0]
        images = np.empty((count, *like.image_shape), np.uint8)
        row_ids, labels = np.empty(count, np.int64), np.empty(count, np.int32)
        coarse = None if like.coarse_labels is None else np.empty(count, np.int32)
        for number, shard in enumerate(self.shards):
            (own,) = np.nonzero(self.places[:, 0] == number)
            positions = self.places[own, 1]
            row_ids[own], labels[own] = shard.row_ids[positions], shard.labels[positions]
            if coarse is not None and shard.coarse_labels is not None:
                coarse[own] = shard.coarse_labels[positions]
            for row, position in zip(own.tolist(), positions.tolist(), strict=True):
                images[row] = shard.images[position]  # quicker than indexing with arrays, which copies twice
        return Rows(row_ids, images, labels, coarse)


class _LaneReader:
    """The rows of a lane from a place on."""

    def __init__(self, lane: Lane, place: int, read_next: Callable[[], Rows]) -> None:
        self._lane, self._slots, self._read_next = lane, lane.slots(place), read_next
        self._window: dict[int, Rows] = {}
        self._left: _Picked | None = None

    def take(self, count: int) -> _Picked:
        parts = []
        while True:
            left = self._left or self._next_slot()
            parts.append(_Picked(left.shards, left.places[:count]))
            self._left = _Picked(left.shards, left.places[count:]) if len(left.places) > count else None
            count -= len(parts[-1].places)
            if not count:
                return _Picked.joined(parts)
            # What was taken is copied, so that the window moves on without the shards that it leaves.
            parts = [_copied(_Picked.joined(parts))]
            del left

    def _next_slot(self) -> _Picked:
        slot, rows = next(self._slots)
        window = self._lane.window(slot)
        self._window = {piece: shard for piece, shard in self._window.items() if piece in window}
        for piece in window:
            if piece not in self._window:
                self._window[piece] = self._read_next()
        return _Picked([self._window[piece] for piece in window], rows - np.array([window.start, 0]))


def _copied(picked: _Picked) -> _Picked:
    rows = picked.rows()
    return _Picked([rows], np.stack([np.zeros(len(rows), np.int64), np.arange(len(rows))], axis=1))


@dataclass(frozen=True)
class _StreamedBatch:
    """Can be used until the next one is asked for."""

    picked: _Picked
    """The rows of the rank's lanes."""
    first: int
    """Position in the global batch of the first of them."""
    groups: int

    def take(self, positions: np.ndarray | slice) -> Rows:
        if isinstance(positions, slice):
            positions = np.arange(positions.start, positions.stop)
        return _Picked(self.picked.shards, self.picked.places[positions - self.first]).rows()
