"""`tf.data` around the batches of one worker, as `fit` reads them."""

import tensorflow as tf

from pipeline.batches import ImageArrays, evaluation_slices, train_batches
from pipeline.config import TrainingConfig

PREFETCHED_BATCHES = 4


def training_dataset(
    train: ImageArrays,
    config: TrainingConfig,
    num_classes: int,
    *,
    rank: int = 0,
    num_workers: int = 1,
    epoch: int = 0,
    step: int = 0,
) -> tf.data.Dataset:
    """What `train_batches` yields, without end."""
    share = config.global_batch_size // num_workers
    truth = tf.TensorSpec((share, num_classes), tf.float32) if config.cutmix else tf.TensorSpec((share,), tf.int32)
    batches = tf.data.Dataset.from_generator(
        lambda: train_batches(train, config, num_classes, rank=rank, num_workers=num_workers, epoch=epoch, step=step),
        output_signature=(tf.TensorSpec((share, *train.images.shape[1:]), tf.uint8), truth),
    )
    # The generator has no end. TensorFlow does not know, and would ask all workers in every step for another batch.
    return batches.repeat().prefetch(PREFETCHED_BATCHES).with_options(_untuned())


def validation_dataset(
    validation: ImageArrays, batch_size: int, *, rank: int = 0, num_workers: int = 1
) -> tf.data.Dataset:
    """What `evaluation_slices` has for this worker, again and again: (b, H, W, C) uint8 and (b,) int32."""
    slices = evaluation_slices(len(validation.labels), batch_size, rank=rank, num_workers=num_workers)
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
    """Without tf.data's autotuner: nothing is to be tuned, and the end of an iterator waits seconds for its thread."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
