"""The order of the rows of an epoch: a pure function of seed, epoch, shard sizes, global batch and window.

Rows that fit the shuffle window are permuted as a whole: `epoch_order`. Otherwise `StreamOrder` mixes the rows of a
sliding window of shards, so that a reader holds a few shards at a time:

1. The shards are permuted, and the sequence of their rows is cut into C equal lanes. A lane is a list of pieces, each
   of them a shard or the part of a shard that a cut has left.
2. Within a lane every piece is permuted and cut into D parts. Part j of piece i goes to slot i + j, so slot t mixes the
   pieces t - D + 1 ... t. Every slot is permuted.
3. A global batch takes the next G / C rows of each lane, lane after lane. A rank takes its slice of it as ever, so it
   reads the lanes of that slice and no others.

None of this depends on the number of workers, and a place in an epoch is found without reading anything before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Tags of the streams of random numbers of an epoch. As spawn keys they give other streams than [seed, epoch, step],
# with which batches are augmented.
_SHARDS, _PIECE, _SLOT = 1, 2, 3
_MOST_LANES = 16
_LEAST_ROWS_OF_LANE = 8
"""Rows of a lane in a global batch, where the window has room for several lanes."""
_LEAST_DEPTH = 2
MIB = 2**20


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits rows that fit the window: a permutation, int64 (num_rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def fits_window(num_rows: int, image_shape: Sequence[int], window_mb: int) -> bool:
    """Whether the pixels of all rows fit the shuffle window, so that they are permuted as a whole.

    Args:
        num_rows: Rows of the split.
        image_shape: Height, width, channels.
        window_mb: `train.shuffle_window_mb`, in MiB.
    """
    return num_rows * int(np.prod(image_shape)) <= window_mb * MIB


@dataclass(frozen=True)
class StreamOrder:
    """The order of rows that do not fit the window."""

    shard_rows: tuple[int, ...]
    """Rows of each shard, S numbers."""
    batch_size: int
    """Rows of a global batch, G."""
    lanes: int
    """Number of lanes, C; divides G."""
    depth: int
    """Shards of a lane that are mixed at a time, D."""
    seed: int

    @classmethod
    def of(
        cls, shard_rows: Sequence[int], row_bytes: int, batch_size: int, window_bytes: int, seed: int
    ) -> StreamOrder:
        """As many lanes, and as deep ones, as the window has room for.

        C is the largest of 1, 2, 4, 8, 16 that divides G, leaves a lane 8 rows of a batch and has room for two shards
        a lane; D is the number of shards for which a lane then has room.

        Args:
            shard_rows: Rows of each shard.
            row_bytes: Bytes of the pixels of a row.
            batch_size: Rows of a global batch.
            window_bytes: Bytes of the pixels that are mixed at a time.
            seed: Seed of the order.

        Raises:
            ValueError: if the window has no room for two shards; names the size that would do.
        """
        shard_bytes = max(shard_rows) * row_bytes
        if _LEAST_DEPTH * shard_bytes > window_bytes:
            enough = -(-_LEAST_DEPTH * shard_bytes // MIB)
            raise ValueError(
                f"train.shuffle_window_mb = {window_bytes / MIB:g} has no room for two of the shards, the largest of "
                f"which has {shard_bytes / MIB:.1f} MiB of pixels: give at least {enough}, or more data.num_shards"
            )
        lanes = 1
        while (
            lanes < _MOST_LANES
            and batch_size % (2 * lanes) == 0
            and batch_size // (2 * lanes) >= _LEAST_ROWS_OF_LANE
            and 2 * lanes * _LEAST_DEPTH * shard_bytes <= window_bytes
        ):
            lanes *= 2
        return cls(tuple(shard_rows), batch_size, lanes, window_bytes // (lanes * shard_bytes), seed)

    @property
    def steps(self) -> int:
        """Global batches of an epoch; the remainder of the rows is left out."""
        return sum(self.shard_rows) // self.batch_size

    @property
    def rows_of_lane(self) -> int:
        """Rows that a lane gives to a global batch."""
        return self.batch_size // self.lanes

    def lanes_of(self, own: slice) -> range:
        """The lanes in which a slice of the global batch lies."""
        return range(own.start // self.rows_of_lane, -(-own.stop // self.rows_of_lane))

    def epoch(self, epoch: int) -> list[Lane]:
        """The C lanes of an epoch."""
        order = _rng(self.seed, epoch, _SHARDS).permutation(len(self.shard_rows))
        ends = np.concatenate([[0], np.cumsum(np.asarray(self.shard_rows, np.int64)[order])])
        cuts = [lane * int(ends[-1]) // self.lanes for lane in range(self.lanes + 1)]
        found = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            first = int(np.searchsorted(ends, start, side="right")) - 1
            last = int(np.searchsorted(ends, stop, side="left"))
            pieces = tuple(
                Piece(
                    int(order[i]), max(start, int(ends[i])) - int(ends[i]), min(stop, int(ends[i + 1])) - int(ends[i])
                )
                for i in range(first, last)
            )
            found.append(Lane(pieces, self.depth, (self.seed, epoch), number))
        return found


@dataclass(frozen=True)
class Piece:
    """The rows of a shard that belong to a lane."""

    shard: int
    """Number of the shard."""
    first: int
    """First row in the shard."""
    stop: int
    """One past the last row in the shard."""


class Lane:
    """The rows of a lane in an epoch, in the order in which they are trained.

    Args:
        pieces: Its pieces in the order in which they are read.
        depth: Number of pieces that a slot mixes.
        key: Seed and epoch.
        number: Number of the lane.
    """

    def __init__(self, pieces: tuple[Piece, ...], depth: int, key: tuple[int, int], number: int) -> None:
        self.pieces, self.depth, self._key, self._number = pieces, depth, key, number
        rows = np.array([piece.stop - piece.first for piece in pieces], np.int64)
        parts = np.arange(depth)
        # (pieces, depth): rows of each part of each piece.
        self._sizes = rows[:, None] // depth + (parts < rows[:, None] % depth)
        slots = np.zeros(len(pieces) + depth - 1, np.int64)
        for part in parts:
            slots[part : part + len(pieces)] += self._sizes[:, part]
        self.starts = np.concatenate([[0], np.cumsum(slots)])
        """int64 (slots + 1,): the place in the lane at which each slot begins, and the end of the lane."""

    def slot_at(self, place: int) -> int:
        """The slot in which a place of the lane lies."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def window(self, slot: int) -> range:
        """Numbers of the pieces that a slot mixes."""
        return range(max(0, slot - self.depth + 1), min(slot + 1, len(self.pieces)))

    def slots(self, place: int) -> Iterator[tuple[int, np.ndarray]]:
        """The slots from a place of the lane on.

        Yields:
            Number of the slot and int64 (n, 2), for each of its rows the number of the piece and the row in the shard.
            The first one lacks the rows before `place`.
        """
        first, orders = self.slot_at(place), dict[int, np.ndarray]()
        for slot in range(first, len(self.starts) - 1):
            window = self.window(slot)
            orders = {piece: orders[piece] if piece in orders else self._order(piece) for piece in window}
            parts = [np.empty((0, 2), np.int64)]
            for piece in reversed(window):
                part = slot - piece
                before = int(self._sizes[piece, :part].sum())
                rows = orders[piece][before : before + int(self._sizes[piece, part])]
                parts.append(np.stack([np.full(len(rows), piece), rows], axis=1))
            mixed = np.concatenate(parts)
            mixed = mixed[_rng(*self._key, _SLOT, self._number, slot).permutation(len(mixed))]
            yield slot, mixed[max(0, place - int(self.starts[slot])) :]

    def _order(self, number: int) -> np.ndarray:
        """The rows of a piece in the order in which they are dealt to its slots."""
        piece = self.pieces[number]
        return piece.first + _rng(*self._key, _PIECE, self._number, number).permutation(piece.stop - piece.first)


def _rng(seed: int, epoch: int, *tag: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(entropy=[seed, epoch], spawn_key=tag))
