"""Ray Data"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import keras
import numpy as np
import tensorflow as tf
from case_registry import BATCH, CROSSENTROPY, OTHER_BATCHES, Result, Worker, X, Y, case, classifier, fitted

ROWS = 6 * BATCH


@contextmanager
def shard_of(worker: Worker) -> Iterator[tf.data.Dataset]:
    """The batches of a worker's rows as Ray's `to_tf` yields them: its part of every global batch."""
    import ray

    ids = np.arange(ROWS).reshape(-1, worker.num_workers, BATCH // worker.num_workers)[:, worker.rank].ravel()
    # Ray creates Unix sockets in it, whose paths may have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        table = ray.data.from_numpy(np.concatenate([X[ids], Y[ids, None]], axis=1))
        rows = table.map_batches(lambda batch: {"x": batch["data"][:, :4], "y": batch["data"][:, 4].astype(np.int32)})
        yield rows.to_tf("x", "y", batch_size=BATCH // worker.num_workers)
        ray.shutdown()


def mlp(worker: Worker) -> keras.Model:
    return worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"])


@case(OTHER_BATCHES)
def to_tf_by_mistake(worker: Worker) -> Result:
    """`to_tf` of each worker's shard, given to `fit` without `distribute`"""
    with shard_of(worker) as data:
        return fitted(mlp(worker), data)


@case()
def to_tf_with_distribute(worker: Worker) -> Result:
    """`distribute` of `to_tf` of each worker's shard"""
    with shard_of(worker) as data:
        return fitted(mlp(worker), worker.distribute(data))
