"""Labelled images in memory: `Rows`; stratified splits, and digests that depend on the rows alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.data.order import epoch_order


class GlobalBatch(Protocol):
    """The rows of a global batch, of which a rank takes its own before it asks for the next batch."""

    @property
    def groups(self) -> int:
        """Number of equal parts of the batch within which a rank can take rows beside its own."""

    def take(self, positions: np.ndarray | slice) -> Rows:
        """The rows at these positions of the global batch, in this order, as new arrays."""


class RowSource(Protocol):
    """The rows of a split, in memory or read from shards as they are needed."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""

    def __len__(self) -> int: ...

    def global_batches(
        self, size: int, seed: int, own: slice, *, epoch: int, step: int
    ) -> Iterator[tuple[int, int, GlobalBatch]]:
        """The global batches from a step of an epoch on, without end.

        Args:
            size: Rows of a global batch.
            seed: Seed of the order.
            own: The slice of every global batch whose rows, with the groups that it touches, can be taken.
            epoch: Number of the epoch, from 0.
            step: Number of the first batch in it.

        Yields:
            Epoch, step, and the batch.
        """


@dataclass(frozen=True)
class Rows:
    """Labelled images of one split."""

    row_ids: np.ndarray
    """int64 (N,): index of each row in its source."""
    images: np.ndarray
    """uint8 (N, H, W, C)."""
    labels: np.ndarray
    """int32 (N,)."""
    coarse_labels: np.ndarray | None = None
    """int32 (N,), or None if the source has none."""

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, coarse_labels: np.ndarray | None = None) -> Rows:
        """All rows of a source's split, whose ids are their positions."""
        return cls(np.arange(len(images)), images, labels, coarse_labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def take(self, positions: np.ndarray | slice) -> Rows:
        """The rows at these positions, in this order, as new arrays; a slice gives views.

        Args:
            positions: int (M,), positions in [0, N).
        """
        coarse = None if self.coarse_labels is None else self.coarse_labels[positions]
        return Rows(self.row_ids[positions], self.images[positions], self.labels[positions], coarse)

    def global_batches(
        self, size: int, seed: int, own: slice, *, epoch: int, step: int
    ) -> Iterator[tuple[int, int, GlobalBatch]]:
        """See `RowSource`; all rows are permuted as a whole, and a rank can take any row of a batch."""
        while True:
            order = epoch_order(len(self), seed, epoch)
            for batch in range(step, len(self) // size):
                yield epoch, batch, _BatchInMemory(self, order[batch * size : (batch + 1) * size])
            epoch, step = epoch + 1, 0

    def parts(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images uint8 (b, H, W, C), at most `size` at a time, each time after their positions int (b,)."""
        for start in range(0, len(self), size):
            positions = np.arange(start, min(start + size, len(self)))
            yield positions, self.images[start : start + size]


@dataclass(frozen=True)
class _BatchInMemory:
    rows: Rows
    order: np.ndarray
    """int64 (G,): positions of the batch's rows."""
    groups: int = 1

    def take(self, positions: np.ndarray | slice) -> Rows:
        return self.rows.take(self.order[positions])


@dataclass(frozen=True)
class RawDataset:
    """A whole data set as its source has it, before validation rows are taken out of `train`, unless it has some."""

    train: Rows
    test: Rows
    label_names: list[str]
    coarse_label_names: list[str] | None = None
    validation: Rows | None = None


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, split: str = "validation", every_class: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Takes `round(fraction * rows)` rows out of every class, for the split `validation` or `test`.

    Args:
        every_class: whether each class must keep a row.

    Returns:
        Positions of the rows that stay, and of those that are taken out, each in ascending order.

    Raises:
        ValueError: if that leaves one of the two without a row, or a class without one that stays.
    """
    streams = {"validation": (), "test": (1,)}  # one of its own for each
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0], spawn_key=streams[split]))
    taken = []
    found, starts = np.unique(np.sort(labels), return_index=True)
    of_class = np.split(np.argsort(labels, kind="stable"), starts[1:])  # one pass, since there may be many classes
    for label, own in zip(found, of_class, strict=True):
        rows = rng.permutation(own)
        taken.append(rows[: round(fraction * len(rows))])
        if every_class and len(taken[-1]) == len(rows):
            raise ValueError(
                f"data.{split}_fraction = {fraction} takes all {len(rows)} rows of the class with the number {label}, "
                "and leaves none for training: take a smaller share, or give the class more"
            )
    held_out = np.sort(np.concatenate(taken))
    train = np.setdiff1d(np.arange(len(labels)), held_out)
    if not len(held_out) or not len(train):
        raise ValueError(
            f"data.{split}_fraction = {fraction} of {len(labels)} rows leaves {len(train)} for training and "
            f"{len(held_out)} for {split}: take another share"
        )
    return train, held_out


def rows_digest(rows: Rows) -> str:
    """The digest of a split as the manifest of `preprocess` has it; `rows` are all its rows in order of `row_ids`."""
    return hashlib.sha256(row_digests(rows)).hexdigest()


def row_digests(rows: Rows) -> bytes:
    """The SHA-256 of each row, 32 bytes a row, one after another; `preprocess` says which bytes make up a row."""
    columns = [rows.row_ids.astype("<i8"), rows.labels.astype("<i4")]
    if rows.coarse_labels is not None:
        columns.append(rows.coarse_labels.astype("<i4"))
    parts = [column[:, np.newaxis].view(np.uint8) for column in columns]
    row_bytes = np.concatenate([*parts, rows.images.reshape(len(rows), -1)], axis=1)
    return b"".join(hashlib.sha256(row).digest() for row in row_bytes)
