"""Batches of arrays in memory: which rows a worker sees at which step, and how they are augmented.

Everything follows from (seed, epoch, step): the rows that a model sees depend neither on the number of workers nor on
where a run was interrupted. An array of 50,000 images of 32 x 32 x 3 takes 154 MB, which every worker holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

if TYPE_CHECKING:
    from pipeline.config import TrainingConfig


@dataclass(frozen=True)
class ImageArrays:
    """A split in memory, in order of `row_ids`."""

    row_ids: np.ndarray
    """int64 (N,): index of the row in its source."""
    images: np.ndarray
    """uint8 (N, H, W, C)."""
    labels: np.ndarray
    """int32 (N,)."""
    coarse_labels: np.ndarray | None = None
    """int32 (N,), or None if the source has none."""


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the rows: a permutation, int64 (num_rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Number of full global batches in an epoch.

    The remainder is left out, so that all batches have one shape; it is another one each epoch, for the order changes.

    Raises:
        ValueError: if there is not a single full batch.
    """
    if global_batch_size > num_rows:
        raise ValueError(
            f"train.global_batch_size = {global_batch_size} is more than the {num_rows} training rows: lower it"
        )
    return num_rows // global_batch_size


def augment(images: np.ndarray, rng: np.random.Generator, settings: TrainingConfig) -> np.ndarray:
    """Shifts, mirrors and zooms every image at random, as `settings` say.

    Args:
        images: uint8 (B, H, W, C); not changed.
        rng: where the random numbers are drawn from.
        settings: `random_crop_padding`, `random_flip` and `random_zoom` are used.

    Returns:
        uint8 (B, H, W, C).
    """
    return _augment_rows(images, np.arange(len(images)), _Augmentation.draw(len(images), rng, settings))


def train_batches(
    data: ImageArrays,
    settings: TrainingConfig,
    num_classes: int,
    *,
    rank: int,
    num_workers: int,
    epoch: int = 0,
    step: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless augmented batches of one worker, from (epoch, step) on.

    Global batch b of an epoch is `epoch_order(...)[b * G : (b + 1) * G]`, and rank r takes the r-th of `num_workers`
    equal slices of it. The random numbers of the augmentation are drawn for the global batch on every rank, which costs
    microseconds and makes the batches of all ranks together the same for any number of workers.

    Yields:
        Images uint8 (G / num_workers, H, W, C) and labels int32 (G / num_workers,); with `settings.cutmix` instead of
        labels the shares of all classes, float32 (G / num_workers, num_classes).

    Raises:
        ValueError: if G cannot be divided among the workers, or is more than there are rows.
    """
    size = settings.global_batch_size
    if size % num_workers:
        raise ValueError(
            f"train.global_batch_size = {size} cannot be divided among train.num_workers = {num_workers}: "
            "take a multiple of it"
        )
    num_steps = steps_per_epoch(len(data.labels), size)
    epoch, step = epoch + step // num_steps, step % num_steps
    own = slice(rank * (size // num_workers), (rank + 1) * (size // num_workers))
    return _endless(data, settings, num_classes, own, num_steps, epoch, step)


def _endless(
    data: ImageArrays,
    settings: TrainingConfig,
    num_classes: int,
    own: slice,
    num_steps: int,
    epoch: int,
    step: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = settings.global_batch_size
    while True:
        order = epoch_order(len(data.labels), settings.seed, epoch)
        for batch in range(step, num_steps):
            rows = order[batch * size : (batch + 1) * size]
            rng = np.random.default_rng([settings.seed, epoch, batch])
            augmentation = _Augmentation.draw(size, rng, settings)
            images, labels = _augment_rows(data.images, rows[own], augmentation.rows(own)), data.labels[rows[own]]
            if settings.cutmix:
                mix = _CutMix.draw(size, data.images.shape[1:3], rng, settings.cutmix).rows(own)
                mixed, others = mix.mixed(), rows[mix.partners]
                pieces = _augment_rows(data.images, others[mixed], augmentation.rows(mix.partners[mixed]))
                images[mixed] = np.where(mix.rows(mixed).masks(), pieces, images[mixed])
                labels = mix.targets(labels, data.labels[others], num_classes)
            yield images, labels
        epoch, step = epoch + 1, 0


def evaluation_slices(num_rows: int, batch_size: int, *, rank: int = 0, num_workers: int = 1) -> np.ndarray:
    """Which rows are a rank's batches: every row exactly once over the ranks, as equally many batches on every rank.

    A global batch is divided among the ranks as evenly as it goes, so that none waits for another that has run out. In
    the last one a rank may get a row less than another, or none: metrics that weight by rows stay exact without
    padding.

    Args:
        num_rows: of the split.
        batch_size: rows in a batch of all ranks together.
        rank: whose part.
        num_workers: number of ranks.

    Returns:
        int64 (batches, 2): first row, and one past the last.
    """
    starts = np.arange(0, num_rows, batch_size)
    sizes = np.minimum(batch_size, num_rows - starts)
    shares, rest = np.divmod(sizes, num_workers)
    first = starts + rank * shares + np.minimum(rank, rest)
    return np.stack([first, first + shares + (rank < rest)], axis=1)


@dataclass(frozen=True)
class _Augmentation:
    """What happens to each image of a batch; None where nothing does."""

    padding: int
    """Pixels added on each side."""
    corners: np.ndarray | None
    """int (B, 2): upper left corner, in pixels down and right, of the window cut from the padded image."""
    flips: np.ndarray | None
    """bool (B,)."""
    zooms: np.ndarray | None
    """float32 (B, 2): factors of height and width by which an output pixel's distance from the middle is multiplied."""

    @classmethod
    def draw(cls, size: int, rng: np.random.Generator, settings: TrainingConfig) -> _Augmentation:
        padding, zoom = settings.random_crop_padding, settings.random_zoom
        return cls(
            padding,
            corners=rng.integers(0, 2 * padding + 1, (size, 2)) if padding else None,
            flips=rng.random(size) < 0.5 if settings.random_flip else None,
            zooms=rng.uniform(1 - zoom, 1 + zoom, (size, 2)).astype(np.float32) if zoom else None,
        )

    def rows(self, rows: slice | np.ndarray) -> _Augmentation:
        """The augmentation of these images alone."""
        parts = (self.corners, self.flips, self.zooms)
        return _Augmentation(self.padding, *(None if part is None else part[rows] for part in parts))


def _augment_rows(images: np.ndarray, rows: np.ndarray, augmentation: _Augmentation) -> np.ndarray:
    """A new array of `images[rows]`, augmented."""
    images = images[rows]
    if augmentation.corners is not None:
        images = _crop(images, augmentation.corners, augmentation.padding)
    if augmentation.flips is not None:
        images[augmentation.flips] = images[augmentation.flips, :, ::-1]
    return images if augmentation.zooms is None else _zoom(images, augmentation.zooms)


def _crop(images: np.ndarray, corners: np.ndarray, padding: int) -> np.ndarray:
    """Cuts from every padded image a window of its former size.

    Images are padded by their own mirror image and not by zeros: pixels are normalised only later, in the model, so
    that zero would not be the mean but black, a frame that no test image has.
    """
    size = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    # A view of all windows, (B, 2 * padding + 1, 2 * padding + 1, H, W, C); indexing copies only the chosen ones.
    windows = np.moveaxis(sliding_window_view(padded, size, axis=(1, 2)), 3, -1)
    return windows[np.arange(len(images)), corners[:, 0], corners[:, 1]]


def _zoom(images: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Bilinear zoom about the middle with reflected borders, as `keras.layers.RandomZoom` does it."""
    import keras

    height, width = images.shape[1:3]
    zoom_h, zoom_w = zooms[:, 0], zooms[:, 1]
    zero = np.zeros_like(zoom_h)
    offset_h, offset_w = (height - 1) / 2 * (1 - zoom_h), (width - 1) / 2 * (1 - zoom_w)
    transform = np.stack([zoom_w, zero, offset_w, zero, zoom_h, offset_h, zero, zero], axis=1)
    zoomed = keras.ops.image.affine_transform(
        images.astype(np.float32), transform, fill_mode="reflect", data_format="channels_last"
    )
    return np.clip(np.rint(keras.ops.convert_to_numpy(zoomed)), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class _CutMix:
    """Which part of each image of a batch comes from which other one (Yun et al., 2019, arXiv:1905.04899)."""

    partners: np.ndarray
    """int (B,): place in the batch of the other image."""
    boxes: np.ndarray
    """int (B, 4): top, bottom, left and right of the part that comes from it; empty where nothing does."""
    size: tuple[int, int]
    """Height and width of an image."""

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], rng: np.random.Generator, share: float) -> _CutMix:
        """As in the paper with alpha = 1: areas uniform in [0, 1], middles anywhere, and the border cuts off."""
        partners = rng.permutation(count)
        is_mixed = rng.random(count) < share
        half_sides = np.sqrt(rng.random(count) * is_mixed)[:, None] * size / 2
        middles = rng.random((count, 2)) * size
        low, high = (np.clip(np.rint(x), 0, size).astype(int) for x in (middles - half_sides, middles + half_sides))
        return cls(partners, np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1), size)

    def rows(self, rows: slice | np.ndarray) -> _CutMix:
        """The part that has to do with these images; their partners may be any image of the batch."""
        return _CutMix(self.partners[rows], self.boxes[rows], self.size)

    def mixed(self) -> np.ndarray:
        """int (M,): which images have such a part."""
        top, bottom, left, right = self.boxes.T
        return np.flatnonzero((top < bottom) & (left < right))

    def masks(self) -> np.ndarray:
        """bool (B, H, W, 1): true where a pixel comes from the other image."""
        top, bottom, left, right = (side[:, None] for side in self.boxes.T)
        down, across = (np.arange(length) for length in self.size)
        rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
        return (rows[:, :, None] & columns[:, None, :])[..., None]

    def targets(self, labels: np.ndarray, others: np.ndarray, num_classes: int) -> np.ndarray:
        """float32 (B, num_classes): each class's share of the image, by area."""
        top, bottom, left, right = self.boxes.T
        share = ((bottom - top) * (right - left) / np.prod(self.size)).astype(np.float32)[:, None]
        classes = np.arange(num_classes)
        return (labels[:, None] == classes) * (1 - share) + (others[:, None] == classes) * share
