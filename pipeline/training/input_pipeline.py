"""`tf.data` datasets of the batches of one worker."""

import tensorflow as tf

from pipeline.data.rows import Rows, RowSource
from pipeline.data.streamed_rows import StreamedRows
from pipeline.training.batches import evaluation_slices, train_batches
from pipeline.training.config import TrainingConfig

PREFETCHED_BATCHES = 4


def training_dataset(
    train: RowSource,
    config: TrainingConfig,
    num_classes: int,
    *,
    rank: int = 0,
    num_workers: int = 1,
    epoch: int = 0,
    step: int = 0,
) -> tf.data.Dataset:
    """The endless batches of `train_batches`."""
    share = config.global_batch_size // num_workers
    truth = tf.TensorSpec((share, num_classes), tf.float32) if config.cutmix else tf.TensorSpec((share,), tf.int32)
    batches = tf.data.Dataset.from_generator(
        lambda: train_batches(train, config, num_classes, rank=rank, num_workers=num_workers, epoch=epoch, step=step),
        output_signature=(tf.TensorSpec((share, *train.image_shape), tf.uint8), truth),
    )
    # The generator is endless. Without `repeat` TensorFlow does not know that, and asks all workers in every step for
    # another batch.
    return batches.repeat().prefetch(PREFETCHED_BATCHES).with_options(_untuned())


def validation_dataset(
    validation: Rows | StreamedRows, batch_size: int, *, rank: int = 0, num_workers: int = 1
) -> tf.data.Dataset:
    """The batches of `evaluation_slices`, repeated without end: images uint8 (b, H, W, C) and labels int32 (b,)."""
    slices = evaluation_slices(len(validation), batch_size, rank=rank, num_workers=num_workers)
    if isinstance(validation, StreamedRows):
        signature = (tf.TensorSpec((None, *validation.image_shape), tf.uint8), tf.TensorSpec((None,), tf.int32))
        streamed = tf.data.Dataset.from_generator(lambda: validation.in_order(slices), output_signature=signature)
        return streamed.repeat().prefetch(PREFETCHED_BATCHES).with_options(_untuned())
    with tf.device("CPU"):
        images, labels = tf.constant(validation.images), tf.constant(validation.labels)
    return (
        tf.data.Dataset.from_tensor_slices(slices)
        .repeat()
        .map(lambda rows: (images[rows[0] : rows[1]], labels[rows[0] : rows[1]]))
        .prefetch(PREFETCHED_BATCHES)
        .with_options(_untuned())
    )


def _untuned() -> tf.data.Options:
    """Turns off tf.data's autotuner: there is nothing to tune, and an iterator would wait seconds for its thread."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
