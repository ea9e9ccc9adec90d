"""Computes a worker's rows in parts that TensorFlow's threads compute side by side.

TensorFlow divides an operation among the threads of its intra-op pool, and the threads wait for one another after each.
A Perceiver has thousands of small operations, so that two threads are 1.4 times as fast as one. The operations of two
halves of a batch do not depend on each other, so that two threads of the inter-op pool, each with whole operations, are
1.9 times as fast (docs/results.md).
"""

import functools
import itertools
from typing import Any

import keras
import tensorflow as tf

from perceiver.config import PerceiverConfig
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel

Size = Any  # an integer, or a tensor where it is not known when the step is traced
MOST_PARTS = 8
"""The graph has the operations of every part: with 8, `cifar100` starts in 34 s instead of 15 s, with 16 in 58 s."""


def num_parts(model_config: PerceiverConfig | OwnModel, config: TrainingConfig) -> int:
    """The number of parts, which is that of the worker's threads, or 1 if operations are divided among the threads.

    A model of one's own is not divided, because its layers may see the other rows of a batch, as BatchNormalization
    does. Nor is a batch on a GPU, which computes one operation at a time, nor one that XLA compiles.
    """
    threads = int(config.cpus_per_worker)
    may_divide = isinstance(model_config, PerceiverConfig) and not config.use_gpu and not config.jit_compile
    return threads if may_divide and 1 < threads <= MOST_PARTS else 1


def compute_in_parts(model: keras.Model, parts: int) -> None:
    """Makes a model compute the logits of a batch in at most so many parts of nearly equally many rows.

    The logits are the same but for rounding, and so are a loss and gradients that are computed from them. Dropout draws
    other numbers. The method `call` is replaced on the instance; a saved `.keras` file does not change.

    Args:
        model: A model in which no row sees the others.
        parts: Most parts.
    """
    whole = model.call

    @functools.wraps(whole)
    def call(images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        rows = images.shape[0]
        number = parts if rows is None else max(1, min(parts, rows))
        if number == 1:
            return whole(images, training=training)
        rows = tf.shape(images)[0] if rows is None else rows
        bounds = [rows * i // number for i in range(number + 1)]
        logits = [part(images, start, stop, training) for start, stop in itertools.pairwise(bounds)]
        return tf.concat(logits, axis=0)

    def part(images: tf.Tensor, start: Size, stop: Size, training: bool | None) -> tf.Tensor:
        if isinstance(start, int):
            return whole(images[start:stop], training=training)
        # A part that has no row computes one and drops it, because not every operation takes an empty batch.
        first = tf.minimum(start, tf.shape(images)[0] - 1)
        return whole(images[first : tf.maximum(stop, first + 1)], training=training)[: stop - start]

    model.call = call
