"""Which rows a worker trains on at which step, and its augmented batches.

Everything follows from (seed, epoch, step): the rows that a model sees depend neither on the number of workers nor on
where a run was interrupted. `pipeline.data.order` says in which order the rows are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pipeline.data.rows import Rows, RowSource
from pipeline.training.augmentation import Augmentation, CutMix, alternating_flips
from pipeline.training.config import TrainingConfig


def steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Number of full global batches in an epoch.

    The remainder is left out, so that all batches have one shape. It has other rows in each epoch, since the order
    changes.

    Raises:
        ValueError: if there is not a single full batch.
    """
    if global_batch_size > num_rows:
        raise ValueError(
            f"train.global_batch_size = {global_batch_size} is more than the {num_rows} training rows: lower it"
        )
    return num_rows // global_batch_size


def train_batches(
    data: RowSource,
    settings: TrainingConfig,
    num_classes: int,
    *,
    rank: int,
    num_workers: int,
    epoch: int = 0,
    step: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless augmented batches of one worker, from (epoch, step) on.

    Rank r takes the r-th of `num_workers` equal slices of each global batch. The random numbers of the augmentation are
    drawn for the global batch on every rank, which costs microseconds and makes the batches of all ranks together the
    same for any number of workers.

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
    num_steps = steps_per_epoch(len(data), size)
    epoch, step = epoch + step // num_steps, step % num_steps
    own = slice(rank * (size // num_workers), (rank + 1) * (size // num_workers))
    return _endless(data, settings, num_classes, own, epoch, step)


def _endless(
    data: RowSource, settings: TrainingConfig, num_classes: int, own: slice, epoch: int, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = settings.global_batch_size
    for at_epoch, at_step, batch in data.global_batches(size, settings.seed, own, epoch=epoch, step=step):
        rng = np.random.default_rng([settings.seed, at_epoch, at_step])
        augmentation = Augmentation.draw(size, rng, settings)
        taken = batch.take(own)
        images, labels = _augmented(taken, augmentation.rows(own), settings, at_epoch), taken.labels
        if settings.cutmix:
            # The batches are endless: a caller may take more of them than the epochs of the settings.
            is_over = settings.cutmix_until < 1 and at_epoch >= settings.cutmix_until * settings.epochs
            share = 0.0 if is_over else settings.cutmix
            mix = CutMix.draw(size, data.image_shape[:2], rng, share, batch.groups).rows(own)
            mixed = mix.mixed()
            partners = mix.partners[mixed]
            others = batch.take(partners)
            pieces = _augmented(others, augmentation.rows(partners), settings, at_epoch)
            images[mixed] = np.where(mix.rows(mixed).masks(), pieces, images[mixed])
            other_labels = labels.copy()  # an image that is not mixed has no share of another class
            other_labels[mixed] = others.labels
            labels = mix.targets(labels, other_labels, num_classes)
        yield images, labels


def _augmented(rows: Rows, augmentation: Augmentation, settings: TrainingConfig, epoch: int) -> np.ndarray:
    """The images of these rows, augmented; may overwrite them."""
    if settings.random_flip and settings.alternating_flip:
        augmentation = replace(augmentation, flips=alternating_flips(rows.row_ids, settings.seed, epoch))
    return augmentation.apply(rows.images)


def evaluation_slices(num_rows: int, batch_size: int, *, rank: int = 0, num_workers: int = 1) -> np.ndarray:
    """The slices of a split that are a rank's batches. Over all ranks every row occurs once.

    All ranks have equally many batches, so that none waits for another that has run out. A global batch is divided
    among the ranks as evenly as possible: in the last one a rank may get a row less than another, or none. Metrics that
    weight by rows stay exact without padding.

    Args:
        num_rows: Rows of the split.
        batch_size: Rows of a batch over all ranks.
        rank: Number of the rank, from 0.
        num_workers: Number of ranks.

    Returns:
        int64 (batches, 2): first row, and one past the last.
    """
    starts = np.arange(0, num_rows, batch_size)
    sizes = np.minimum(batch_size, num_rows - starts)
    shares, rest = np.divmod(sizes, num_workers)
    first = starts + rank * shares + np.minimum(rank, rest)
    return np.stack([first, first + shares + (rank < rest)], axis=1)
