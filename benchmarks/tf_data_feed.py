"""Batches for plain Keras training, the baseline of train_overhead.py: the usual tf.data code, without the pipeline."""

from typing import Any, Literal

from pipeline.data.rows import Rows
from pipeline.training.config import TrainingConfig

# Augmentation in tf.data, in the pipeline's dataset, or in the training step; "none" repeats one batch as it is.
Feed = Literal["tf.data", "generator", "device", "none"]


def feed(kind: Feed, rows: Rows, settings: TrainingConfig, num_classes: int) -> Any:
    """A `tf.data.Dataset` of batches, repeated without end, as the usual tf.data code makes them.

    Args:
        kind: Where the batches are augmented.
        rows: Training rows.
        settings: Batch size B, and the settings of the augmentation.
        num_classes: Number of classes.

    Returns:
        Batches of images (B, H, W, C) uint8 and labels (B,); of "generator" with CutMix, the shares of the classes
        (B, `num_classes`) instead of labels.
    """
    import tensorflow as tf

    from pipeline.training.input_pipeline import training_dataset

    if kind == "generator":
        return training_dataset(rows, settings, num_classes)
    arrays = tf.data.Dataset.from_tensor_slices((rows.images, rows.labels))
    if kind == "none":
        return arrays.batch(settings.global_batch_size, drop_remainder=True).take(1).cache().repeat()
    batches = arrays.shuffle(len(rows.labels)).repeat().batch(settings.global_batch_size, drop_remainder=True)
    if kind == "tf.data":
        batches = batches.map(lambda images, labels: (augmented(images, settings), labels), tf.data.AUTOTUNE)
    return batches.prefetch(tf.data.AUTOTUNE)


def augmented(images: Any, settings: TrainingConfig) -> Any:
    """The crop and flip of `pipeline.training.augmentation`, without its zoom, as TensorFlow operations.

    Args:
        images: uint8 (B, H, W, C).
        settings: Padding of the random crop, and whether images are flipped.
    """
    import tensorflow as tf

    size, height, width = images.shape[:3]
    pad = settings.random_crop_padding
    if pad:
        corners = tf.random.uniform((size, 2), 0, 2 * pad + 1, tf.int32)
        padded = tf.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), "REFLECT")
        images = tf.gather(padded, corners[:, :1] + tf.range(height), axis=1, batch_dims=1)
        images = tf.gather(images, corners[:, 1:] + tf.range(width), axis=2, batch_dims=1)
    if settings.random_flip:
        images = tf.where(tf.random.uniform((size, 1, 1, 1)) < 0.5, images[:, :, ::-1], images)
    return images
