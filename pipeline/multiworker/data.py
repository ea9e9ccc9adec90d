"""Batches: the share of a global batch that each replica gets, and batches that a worker already has for itself."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

OTHER_ROWS = (
    "the tensors of a batch have unequal numbers of rows, so that it cannot be divided among workers: what has no row "
    "for each row of the batch, such as a table, may be an attribute of the model"
)


class Share(NamedTuple):
    """The rows of a global batch that one replica computes on.

    Attributes:
        data: The batch with the replica's rows. A replica without rows has one row of another replica, because not
            every layer accepts an empty batch.
        rows: Number of rows that count, int32 of shape (); 0 for a replica without rows.
        total: Number of rows of the global batch, int32 of shape ().
        fingerprint: Hash of the global batch, int64 of shape (). It is the same on all workers if the batch is.
    """

    data: Any
    rows: tf.Tensor
    total: tf.Tensor
    fingerprint: tf.Tensor


def shares(dataset: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """Divides global batches among the replicas.

    Every worker reads all batches and takes its rows of each, so the batches, their number and their order are those of
    a single process, whatever the dataset reads.

    Args:
        dataset: Global batches, the same on all workers.
        strategy: Strategy whose replicas take part.

    Returns:
        A distributed dataset of `Share`s.
    """
    replicas = strategy.num_replicas_in_sync
    spec = dataset.element_spec

    def of_this_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        def divide(*batch: Any) -> Share:
            # tf.data passes the entries of a tuple as arguments.
            return share(batch if type(spec) is tuple else batch[0], context.input_pipeline_id, replicas)

        return dataset.map(divide)

    return strategy.distribute_datasets_from_function(of_this_worker)


def share(batch: Any, replica: int, replicas: int) -> Share:
    """Returns the rows of `batch` that belong to one of `replicas` replicas."""
    total = rows_of(batch)
    refuse_other_rows(batch)
    start, stop = replica * total // replicas, (replica + 1) * total // replicas
    if isinstance(total, int):
        first, last = min(start, total - 1), max(stop, min(start, total - 1) + 1)
    else:
        first = tf.maximum(tf.minimum(start, total - 1), 0)
        last = tf.maximum(stop, first + 1)
    return Share(
        tf.nest.map_structure(lambda value: _slice(value, first, last), batch),
        tf.cast(stop - start, tf.int32),
        tf.cast(total, tf.int32),
        fingerprint(batch),
    )


def rows_of(batch: Any) -> int | tf.Tensor:
    """Number of rows in a batch: an int if it is known statically, otherwise a tensor.

    Raises:
        ValueError: if the batch contains no tensor that has rows.
    """
    rows = next(_rows_of_each(batch), None)
    if rows is None:
        raise ValueError("a batch without a tensor that has rows cannot be divided among workers")
    return rows


def refuse_other_rows(batch: Any) -> None:
    """Refuses a batch whose tensors have unequal numbers of rows, which would be cut as if all had the same.

    Raises:
        ValueError: if the numbers are known statically; otherwise the operations raise an InvalidArgumentError.
    """
    rows = list(_rows_of_each(batch))
    known = {number for number in rows if isinstance(number, int)}
    if len(known) > 1:
        raise ValueError(f"{OTHER_ROWS} (rows of the tensors: {sorted(known)})")
    for number in rows[1:]:
        if not (isinstance(number, int) and isinstance(rows[0], int)):
            tf.debugging.assert_equal(number, rows[0], OTHER_ROWS)


def _rows_of_each(batch: Any) -> Iterator[int | tf.Tensor]:
    for value in tf.nest.flatten(batch):
        if isinstance(value, tf.RaggedTensor):
            yield value.nrows(out_type=tf.int32)
        elif isinstance(value, tf.SparseTensor):
            yield tf.cast(value.dense_shape[0], tf.int32)
        elif hasattr(value, "shape") and len(value.shape):
            yield value.shape[0] or tf.shape(value)[0]


def with_a_row(batch: Any, rows: int | tf.Tensor) -> Any:
    """Returns the batch, or a batch with one row of zeros if `rows` turns out to be 0."""
    if isinstance(rows, int):
        return batch
    missing = tf.maximum(1 - rows, 0)

    def padded(value: Any) -> Any:
        if not tf.is_tensor(value) or isinstance(value, tf.RaggedTensor | tf.SparseTensor) or value.shape.rank == 0:
            return value
        zeros = tf.zeros(tf.concat([[missing], tf.shape(value)[1:]], 0), value.dtype)
        return tf.ensure_shape(tf.concat([value, zeros], 0), [None, *value.shape[1:]])

    return tf.nest.map_structure(padded, batch)


def fingerprint(batch: Any) -> tf.Tensor:
    """Hash of all values and shapes of a batch, int64 of shape ()."""
    hashes = [
        tf.raw_ops.Fingerprint(data=tf.reshape(part, [1, -1]), method="farmhash64")
        for value in tf.nest.flatten(batch, expand_composites=True)
        if tf.is_tensor(value) and value.dtype not in (tf.variant, tf.resource)
        for part in (
            tf.concat([tf.shape(value), [0]], 0),
            tf.cast(value, tf.uint8) if value.dtype == tf.bool else value,
        )
    ]
    whole = tf.raw_ops.Fingerprint(data=tf.concat(hashes, axis=1), method="farmhash64")
    return tf.bitcast(whole, tf.int64)[0]


def distribute(dataset: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """Wraps a dataset of this worker's batches, so that `fit` does not divide it among the workers again.

    A global batch consists of the batches that all workers yield in one step. Workers may yield batches of different
    sizes and different numbers of batches: a worker that has run out takes part with empty batches until the last
    worker has run out. In each step the workers have to ask each other whether any of them has another batch; endless
    datasets (`.repeat()`, with `steps_per_epoch`) avoid this.

    Args:
        dataset: Batches (x, y) or (x, y, sample_weight) of this worker.
        strategy: Strategy that the model was created in. Unless it is a MultiWorkerMirroredStrategy, `dataset` is
            returned as it is.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return dataset
    if dataset.cardinality() != tf.data.INFINITE_CARDINALITY:
        # The filter makes the cardinality unknown. Otherwise Keras would end a worker's epoch after as many batches as
        # this worker has.
        dataset = dataset.filter(lambda *_: True)
    distributed: Any = strategy.distribute_datasets_from_function(lambda _: dataset)
    # With `class_weight`, Keras maps the rows of any dataset to such with weights, and prefetches them.
    distributed.map = lambda function: distribute(dataset.map(function), strategy)
    distributed.prefetch = lambda _: distributed
    return distributed


def _slice(value: Any, first: int | tf.Tensor, last: int | tf.Tensor) -> Any:
    if isinstance(value, tf.SparseTensor):
        first, size = tf.cast(first, tf.int64), tf.cast(last - first, tf.int64)
        rest = value.dense_shape[1:]
        return tf.sparse.slice(value, tf.concat([[first], tf.zeros_like(rest)], 0), tf.concat([[size], rest], 0))
    if not hasattr(value, "shape") or len(value.shape) == 0:
        return value
    return value[first:last]
