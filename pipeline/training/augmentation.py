"""Random crops, flips and zooms of training images, and CutMix; NumPy on uint8 images.

The layers of Keras that do the same draw their random numbers as they run. Here they are drawn beforehand, for a whole
batch, so that each worker can augment its part of the batch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pipeline.training.config import TrainingConfig


@dataclass(frozen=True)
class Augmentation:
    """Random crops, flips and zooms of a batch of B images; None for a kind that is off."""

    padding: int
    """Pixels added on each side before a crop."""
    corners: np.ndarray | None
    """int (B, 2): upper left corner, in pixels down and right, of the window cut from the padded image."""
    flips: np.ndarray | None
    """bool (B,): whether the image is mirrored left to right."""
    zooms: np.ndarray | None
    """float32 (B, 2): factors on the distance of an output pixel from the centre, down and across; above 1 shrinks."""

    @classmethod
    def draw(cls, size: int, rng: np.random.Generator, settings: TrainingConfig) -> Augmentation:
        """Draws the augmentation of `size` images."""
        padding, zoom = settings.random_crop_padding, settings.random_zoom
        return cls(
            padding,
            corners=rng.integers(0, 2 * padding + 1, (size, 2)) if padding else None,
            flips=rng.random(size) < 0.5 if settings.random_flip else None,
            zooms=rng.uniform(1 - zoom, 1 + zoom, (size, 2)).astype(np.float32) if zoom else None,
        )

    def rows(self, rows: slice | np.ndarray) -> Augmentation:
        """The augmentation of these images of the batch."""
        parts = (self.corners, self.flips, self.zooms)
        return Augmentation(self.padding, *(None if part is None else part[rows] for part in parts))

    def apply(self, images: np.ndarray) -> np.ndarray:
        """The augmented images, uint8 (B, H, W, C); may overwrite `images`, which has the same shape."""
        if self.corners is not None:
            images = _crop(images, self.corners, self.padding)
        if self.flips is not None:
            images[self.flips] = images[self.flips, :, ::-1]
        return images if self.zooms is None else _zoom(images, self.zooms)


def alternating_flips(row_ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Whether each row is mirrored in an epoch: in every second one, and half of the rows in the first (Jordan, 2024).

    Two epochs that follow each other thus show every row both ways. With flips by chance, half of the rows are seen
    the same way twice (arXiv:2404.00498, section 3.6).

    Args:
        row_ids: int64 (N,).
        seed: Seed that chooses the rows.
        epoch: Number of the epoch, from 0.

    Returns:
        bool (N,); a row's value depends on its id alone, so that no rank has to know the other rows.
    """
    # SplitMix64 (Steele et al., 2014), whose bits are even for ids that follow one another.
    start = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = row_ids.astype(np.uint64) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z >> np.uint64(63)).astype(np.int64) + epoch) % 2 == 1


def _crop(images: np.ndarray, corners: np.ndarray, padding: int) -> np.ndarray:
    """Cuts a window of the original size from every padded image.

    Images are padded by reflection rather than by zeros: pixels are normalised later, in the model, so that zeros would
    be a black frame, which no test image has, rather than the mean.
    """
    size = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    # A view of all windows, (B, 2 * padding + 1, 2 * padding + 1, H, W, C); indexing copies only the chosen ones.
    windows = np.moveaxis(sliding_window_view(padded, size, axis=(1, 2)), 3, -1)
    return windows[np.arange(len(images)), corners[:, 0], corners[:, 1]]


def _zoom(images: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Bilinear zoom about the centre with reflected borders, as in `keras.layers.RandomZoom`."""
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
class CutMix:
    """CutMix (Yun et al., 2019, arXiv:1905.04899): a box of each mixed image comes from another image of the batch."""

    partners: np.ndarray
    """int (B,): position of the other image in the batch."""
    boxes: np.ndarray
    """int (B, 4): top, bottom, left and right of the box; empty where an image is not mixed."""
    size: tuple[int, int]
    """Height and width of an image."""

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], rng: np.random.Generator, share: float, groups: int = 1) -> CutMix:
        """Draws boxes as in the paper with alpha = 1: areas uniform in [0, 1], centres anywhere, clipped to the image.

        Args:
            count: Number of images B.
            size: Height and width of an image.
            rng: Random generator.
            share: Probability that an image is mixed.
            groups: Number of equal parts of the batch; the partner of an image is in the same part.
        """
        if groups == 1:
            partners = rng.permutation(count)
        else:
            partners = rng.permuted(np.arange(count).reshape(groups, -1), axis=1).reshape(-1)
        is_mixed = rng.random(count) < share
        half_sides = np.sqrt(rng.random(count) * is_mixed)[:, None] * size / 2
        middles = rng.random((count, 2)) * size
        low, high = (np.clip(np.rint(x), 0, size).astype(int) for x in (middles - half_sides, middles + half_sides))
        return cls(partners, np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1), size)

    def rows(self, rows: slice | np.ndarray) -> CutMix:
        """The boxes of these images; their partners are still positions in the whole batch."""
        return CutMix(self.partners[rows], self.boxes[rows], self.size)

    def mixed(self) -> np.ndarray:
        """int (M,): positions of the images whose box is not empty."""
        top, bottom, left, right = self.boxes.T
        return np.flatnonzero((top < bottom) & (left < right))

    def masks(self) -> np.ndarray:
        """bool (B, H, W, 1): true inside the box."""
        top, bottom, left, right = (side[:, None] for side in self.boxes.T)
        down, across = (np.arange(length) for length in self.size)
        rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
        return (rows[:, :, None] & columns[:, None, :])[..., None]

    def targets(self, labels: np.ndarray, others: np.ndarray, num_classes: int) -> np.ndarray:
        """float32 (B, num_classes): share of each class in the image, by area.

        Args:
            labels: (B,) integers.
            others: (B,) integers, labels of the other images.
            num_classes: Number of classes.
        """
        top, bottom, left, right = self.boxes.T
        share = ((bottom - top) * (right - left) / np.prod(self.size)).astype(np.float32)[:, None]
        classes = np.arange(num_classes)
        return (labels[:, None] == classes) * (1 - share) + (others[:, None] == classes) * share
