"""The rows that every rank sees in each step, and their augmentation."""

from dataclasses import replace
from itertools import islice

import keras
import numpy as np
import pytest

from pipeline.data.order import epoch_order
from pipeline.data.rows import Rows
from pipeline.training.augmentation import Augmentation, alternating_flips
from pipeline.training.batches import evaluation_slices, steps_per_epoch, train_batches
from pipeline.training.config import TrainingConfig

PLAIN = TrainingConfig(
    num_workers=1, global_batch_size=8, random_crop_padding=0, random_flip=False, random_zoom=0.0, seed=5
)
AUGMENTED = replace(PLAIN, random_crop_padding=4, random_flip=True, random_zoom=0.2)
MIXED = replace(AUGMENTED, cutmix=0.7)
ALTERNATING = replace(MIXED, alternating_flip=True)
NUM_CLASSES = 37


@pytest.fixture(scope="module")
def data() -> Rows:
    """37 random images, whose labels are their row numbers."""
    images = np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3), dtype=np.uint8)
    return Rows(np.arange(37), images, np.arange(37, dtype=np.int32))


def images_of(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def augment(images: np.ndarray, rng: np.random.Generator, settings: TrainingConfig) -> np.ndarray:
    return Augmentation.draw(len(images), rng, settings).apply(images.copy())


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(100, seed=3, epoch=epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[1], epoch_order(100, seed=3, epoch=1))
    assert not np.array_equal(orders[1], epoch_order(100, seed=4, epoch=1))


def test_steps_are_full_batches() -> None:
    assert [steps_per_epoch(rows, 8) for rows in (8, 15, 16)] == [1, 1, 2]
    with pytest.raises(ValueError, match=r"train\.global_batch_size = 8 is more than the 7 training rows"):
        steps_per_epoch(7, 8)


def test_batches_are_the_rows_of_the_epoch_order(data: Rows) -> None:
    batches = train_batches(data, PLAIN, NUM_CLASSES, rank=0, num_workers=1)
    for epoch in range(3):
        order = epoch_order(37, PLAIN.seed, epoch)
        for step in range(4):
            images, labels = next(batches)
            rows = order[step * 8 : (step + 1) * 8]
            np.testing.assert_array_equal(labels, rows)
            np.testing.assert_array_equal(images, data.images[rows])
            assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("num_workers", [2, 4, 8])
@pytest.mark.parametrize(
    "settings", [PLAIN, AUGMENTED, MIXED, ALTERNATING], ids=["plain", "augmented", "mixed", "alternating"]
)
def test_all_ranks_together_see_what_one_worker_sees(data: Rows, settings: TrainingConfig, num_workers: int) -> None:
    single = islice(train_batches(data, settings, NUM_CLASSES, rank=0, num_workers=1), 6)
    ranks = [
        train_batches(data, settings, NUM_CLASSES, rank=rank, num_workers=num_workers) for rank in range(num_workers)
    ]
    for images, labels in single:
        parts = [next(rank) for rank in ranks]
        assert {len(part) for _, part in parts} == {8 // num_workers}
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), images)
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), labels)


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 3), (1, 0), (1, 2), (0, 4), (0, 6)])
def test_a_resumed_run_sees_what_an_unbroken_one_does(data: Rows, epoch: int, step: int) -> None:
    unbroken = islice(train_batches(data, MIXED, NUM_CLASSES, rank=1, num_workers=2), 4 * epoch + step, 12)
    resumed = train_batches(data, MIXED, NUM_CLASSES, rank=1, num_workers=2, epoch=epoch, step=step)
    for (images, labels), (images_again, labels_again) in zip(unbroken, resumed, strict=False):
        np.testing.assert_array_equal(images_again, images)
        np.testing.assert_array_equal(labels_again, labels)


def test_an_indivisible_batch_names_both_numbers(data: Rows) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size = 8 cannot .* train\.num_workers = 3"):
        train_batches(data, PLAIN, NUM_CLASSES, rank=0, num_workers=3)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 36, 37, 100])
def test_evaluation_visits_every_row_exactly_once(batch_size: int, num_workers: int) -> None:
    ranks = [evaluation_slices(37, batch_size, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    seen: list[int] = []
    for batch, parts in enumerate(zip(*ranks, strict=True)):
        expected = np.array_split(np.arange(batch * batch_size, min((batch + 1) * batch_size, 37)), num_workers)
        for (start, stop), rows in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(np.arange(start, stop), rows)
            seen.extend(range(start, stop))
    assert seen == list(range(37))


def test_augmentation_that_is_off_changes_nothing() -> None:
    images = images_of(4)
    np.testing.assert_array_equal(augment(images, np.random.default_rng(0), PLAIN), images)


def test_augmentation_depends_on_its_arguments_alone() -> None:
    images = images_of(16)
    before = images.copy()
    first, second = (augment(images, np.random.default_rng(7), AUGMENTED) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == np.uint8
    assert not np.shares_memory(first, images)
    assert not np.array_equal(first, augment(images, np.random.default_rng(8), AUGMENTED))


def test_half_of_the_images_are_mirrored() -> None:
    images = images_of(400)
    flipped = augment(images, np.random.default_rng(0), replace(PLAIN, random_flip=True))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == images).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_alternating_flips_show_every_row_both_ways_in_two_epochs(data: Rows) -> None:
    settings = replace(PLAIN, random_flip=True, alternating_flip=True, global_batch_size=37)
    batches = train_batches(data, settings, NUM_CLASSES, rank=0, num_workers=1)
    mirrored = np.empty((4, 37), bool)
    for epoch in range(4):
        images, labels = next(batches)
        for image, row in zip(images, labels, strict=True):
            mirrored[epoch, row] = not np.array_equal(image, data.images[row])
            expected = data.images[row][:, ::-1] if mirrored[epoch, row] else data.images[row]
            np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(mirrored[1], ~mirrored[0])
    np.testing.assert_array_equal(mirrored[2:], mirrored[:2])
    assert 9 <= mirrored[0].sum() <= 28
    many = alternating_flips(np.arange(10_000), seed=0, epoch=0)
    assert abs(many.mean() - 0.5) < 0.02
    assert abs((many == alternating_flips(np.arange(10_000), seed=1, epoch=0)).mean() - 0.5) < 0.02


def test_alternating_flips_do_not_mirror_by_themselves(data: Rows) -> None:
    settings = replace(PLAIN, random_flip=False, alternating_flip=True)
    images, labels = next(train_batches(data, settings, NUM_CLASSES, rank=0, num_workers=1))
    np.testing.assert_array_equal(images, data.images[labels])


def test_no_image_is_mixed_after_the_given_share_of_the_epochs(data: Rows) -> None:
    settings = replace(PLAIN, cutmix=1.0, cutmix_until=0.5, epochs=4)
    batches = train_batches(data, settings, NUM_CLASSES, rank=0, num_workers=1)
    mixed = [(next(batches)[1].max(axis=1) < 1).any() for _ in range(4 * steps_per_epoch(37, 8))]
    assert mixed == [True] * 8 + [False] * 8


def test_images_are_mixed_to_the_end_even_of_more_batches_than_the_epochs_have(data: Rows) -> None:
    """As benchmarks take them."""
    batches = train_batches(data, replace(PLAIN, cutmix=1.0, epochs=1), NUM_CLASSES, rank=0, num_workers=1)
    assert all((next(batches)[1].max(axis=1) < 1).any() for _ in range(4 * steps_per_epoch(37, 8)))


def test_a_crop_is_a_window_of_the_reflected_image_and_every_shift_occurs() -> None:
    padding, images = 2, images_of(500, side=6)
    cropped = augment(images, np.random.default_rng(0), replace(PLAIN, random_crop_padding=padding))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    windows = [padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    found = np.array([(window == cropped).all((1, 2, 3)) for window in windows])
    assert (found.sum(0) == 1).all(), "each image is one of the 25 windows"
    assert found.any(1).all(), "each of the 25 windows is taken by some image"


def test_zoom_is_that_of_keras() -> None:
    """Compares with `keras.layers.RandomZoom` for the same factors."""
    images = images_of(8).astype(np.float32)
    factors = np.random.default_rng(3).uniform(0.8, 1.2, (8, 2)).astype(np.float32)
    layer = keras.layers.RandomZoom(0.2, 0.2, data_format="channels_last")
    transformation = {"height_zoom": factors[:, :1], "width_zoom": factors[:, 1:], "input_shape": images.shape}
    expected = keras.ops.convert_to_numpy(layer.transform_images(images, transformation))
    zoomed = augment(images.astype(np.uint8), np.random.default_rng(3), replace(PLAIN, random_zoom=0.2))
    np.testing.assert_allclose(zoomed, expected, atol=0.51)
    assert not np.allclose(zoomed, images, atol=20)


def test_zoom_keeps_a_flat_image_flat() -> None:
    images = np.full((4, 9, 7, 1), 255, np.uint8)
    np.testing.assert_array_equal(augment(images, np.random.default_rng(0), replace(PLAIN, random_zoom=0.5)), images)


def mixed_batch(data: Rows, settings: TrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    return next(train_batches(data, replace(settings, global_batch_size=37), NUM_CLASSES, rank=0, num_workers=1))


def test_a_mixed_image_is_a_rectangle_of_one_in_another_and_its_target_their_areas(data: Rows) -> None:
    areas = []
    for seed in range(8):
        images, targets = mixed_batch(data, replace(PLAIN, cutmix=1.0, seed=seed))
        rows = epoch_order(37, seed, 0)
        assert targets.dtype == np.float32
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
        for image, target, row in zip(images, targets, rows, strict=True):
            foreign = (image != data.images[row]).any(-1)
            others = set(np.flatnonzero(target)) - {row}
            if not foreign.any():
                assert target[row] == 1
                continue
            (other,) = others
            down, across = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
            box = np.s_[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
            np.testing.assert_array_equal(image[box], data.images[other][box])
            assert target[other] == pytest.approx(image[box].shape[0] * image[box].shape[1] / 32**2)
            areas.append(target[other])
    # Uniform areas have a mean of 0.5, of which the border cuts some off.
    assert 0.25 < np.mean(areas) < 0.45
    assert np.max(areas) > 0.8


def test_the_part_of_another_image_is_augmented_as_that_image_is(data: Rows) -> None:
    settings = replace(PLAIN, random_flip=True)
    whole, rows = mixed_batch(data, settings)
    is_mirrored = dict(zip(rows, (whole != data.images[rows]).any((1, 2, 3)), strict=True))
    # Mixing draws its random numbers last, so that images are mirrored as without it.
    images, targets = mixed_batch(data, replace(settings, cutmix=1.0))
    seen = []
    for image, target, row in zip(images, targets, rows, strict=True):
        for other in set(np.flatnonzero(target > 0.01)) - {row}:
            plain, mirrored = (
                (image == part).all(-1).sum() for part in (data.images[other], data.images[other, :, ::-1])
            )
            assert (mirrored > plain) == is_mirrored[other]
            seen.append(is_mirrored[other])
    assert 5 < sum(seen) < len(seen) - 5


def test_the_share_of_mixed_images_is_as_set(data: Rows) -> None:
    mixed = [(mixed_batch(data, replace(PLAIN, cutmix=0.3, seed=seed))[1].max(1) < 1).mean() for seed in range(20)]
    assert 0.2 < np.mean(mixed) < 0.35
