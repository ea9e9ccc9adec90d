"""The rows of a split whose pixels stay in its shards: labels in memory, images as they are asked for."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.rows import Rows
from pipeline.data.shard_reader import Entry, ShardReader


class ShardedRows:
    """Like `Rows`, in order of `row_ids`; takes 20 to 24 bytes of memory a row. Making it reads every shard once.

    Args:
        reader: Reads a shard.
        shards: Manifest entries of the shards, `{path, rows, sha256}`.
        image_shape: Height, width, channels.

    Raises:
        CorruptFileError: if a shard is missing or has other bytes; so do `take` and `parts`.
    """

    def __init__(self, reader: ShardReader, shards: Sequence[Entry], image_shape: tuple[int, int, int]) -> None:
        self._reader, self._shards, self.image_shape = reader, shards, image_shape
        tables = [reader.table(shard, ("row_id", "label", "coarse_label")) for shard in shards]
        columns = {
            name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names
        }
        order = np.argsort(columns["row_id"])
        self.row_ids, self.labels = columns["row_id"][order], columns["label"][order]
        self.coarse_labels = columns["coarse_label"][order] if "coarse_label" in columns else None
        self._starts = np.concatenate([[0], np.cumsum([shard["rows"] for shard in shards])])
        self._places = order
        """Place of each row in the sequence of all shards."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray) -> Rows:
        """The rows at these positions, int (M,), in this order; reads the shards in which they are."""
        images = np.empty((len(positions), *self.image_shape), np.uint8)
        places = self._places[positions]
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(numbers):
            (wanted,) = np.nonzero(numbers == number)
            shard = self._reader.read(self._shards[number])
            images[wanted] = shard.images[places[wanted] - self._starts[number]]
        coarse = None if self.coarse_labels is None else self.coarse_labels[positions]
        return Rows(self.row_ids[positions], images, self.labels[positions], coarse)

    def parts(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images uint8 (b, H, W, C), at most `size` at a time, each time after their positions int (b,)."""
        position_of = np.argsort(self._places)
        for number, entry in enumerate(self._shards):
            shard, start = self._reader.read(entry), int(self._starts[number])
            for first in range(0, len(shard), size):
                stop = min(first + size, len(shard))
                yield position_of[start + first : start + stop], shard.images[first:stop]
