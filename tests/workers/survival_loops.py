"""A training loop for test_survival.py that wraps the real one and records its steps; pickled by value into workers."""

import functools
import os
import sys
from typing import Any

import numpy as np
import ray.train

from pipeline.data.ray_rows import to_rows
from pipeline.training.batches import steps_per_epoch
from pipeline.workers import train

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

real_loop = train.train_loop_per_worker


def counting_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """The real loop with a model that counts, in an additional weight, how often it was trained on each row.

    As the counts are weights, a checkpoint contains exactly those of the steps that led to it. Rank 0 also writes each
    step, as `<process id> <epoch> <step>`, to the file `settings["steps"]`.
    """
    import tensorflow as tf

    from perceiver.model import Perceiver
    from pipeline.training import fit, models, recorder

    rows = to_rows(ray.train.get_dataset_shard("train"))
    epochs = settings["train"]["epochs"]
    steps = steps_per_epoch(len(rows.labels), settings["train"]["global_batch_size"])
    # A random projection of its pixels identifies a row.
    projection = np.random.default_rng(0).integers(1 << 40, size=rows.images[0].size)
    keys = rows.images.reshape(len(rows.labels), -1).astype(np.int64) @ projection
    order = np.argsort(keys)

    class CountingPerceiver(Perceiver):
        def build(self, input_shape: Any = None) -> None:
            super().build(input_shape)
            shape = (epochs * len(keys),)
            self.counts = self.add_weight(
                name="counts", shape=shape, initializer="zeros", trainable=False, aggregation="sum"
            )

        def call(self, images: Any, attention_mask: Any = None, training: bool | None = None) -> Any:
            if training:
                pixels = tf.cast(tf.reshape(images, (-1, projection.size)), tf.int64)
                found = tf.searchsorted(keys[order], tf.reduce_sum(pixels * projection, axis=1))
                epoch = tf.cast(self.optimizer.iterations, tf.int32) // steps
                index = epoch * len(keys) + tf.gather(tf.constant(order, tf.int32), found)
                self.counts.value.assign_add(tf.reduce_sum(tf.one_hot(index, epochs * len(keys)), axis=0))
            return super().call(images, attention_mask, training=training)

    after_step = recorder.Recorder.on_train_batch_end

    def note_step(recorder: Any, batch: int, logs: dict[str, Any] | None = None) -> None:
        before = recorder.progress.epoch, recorder.progress.step + 1
        if recorder.worker.rank == 0:
            with open(settings["steps"], "a") as log:
                log.write(f"{os.getpid()} {before[0]} {before[1]}\n")
        after_step(recorder, batch, logs)

    models.Perceiver = CountingPerceiver  # type: ignore[attr-defined]
    # The check before the first step changes a few pixels, by which rows are known here.
    enable = functools.partial(fit.multiworker.enable, check=False)  # type: ignore[attr-defined]
    fit.multiworker.enable = enable  # type: ignore[attr-defined]
    recorder.Recorder.on_train_batch_end = note_step  # type: ignore[method-assign, assignment]
    return real_loop(settings)
