"""The first rows of a batch, of which the check computes a step."""

import base64
import json
from typing import Any

import tensorflow as tf

from .data import Share, refuse_other_rows, rows_of
from .exchange import messages_of_all_workers

ROWS = 8  # of the first batch, over all workers


def first_rows(batch: Any, strategy: tf.distribute.Strategy) -> Any:
    """Returns the first rows of a batch of all workers, the same on each; all workers call it.

    Args:
        batch: `Share`s or the batches of this worker.
        strategy: Strategy of the workers.
    """

    def local(value: Any) -> Any:
        return strategy.experimental_local_results(value)[0]

    data = batch.data if isinstance(batch, Share) else batch
    rows = batch.rows if isinstance(batch, Share) else None
    first = [local(value) for value in tf.nest.flatten(data)]
    first = [None if isinstance(value, tf.experimental.Optional) else value for value in first]
    refuse_other_rows(first)
    count = int(local(rows)) if rows is not None else int(rows_of(first))
    wanted = min(count, -(-ROWS // strategy.num_replicas_in_sync))
    taken = take(tf.nest.pack_sequence_as(data, first), slice(0, wanted))
    parts = tf.nest.flatten(taken, expand_composites=True)
    message = json.dumps([wanted, [None if part is None else _encoded(part) for part in parts]]).encode()
    of_workers = [json.loads(found) for found in messages_of_all_workers(strategy, message)]
    batches = [
        tf.nest.pack_sequence_as(taken, [part and _decoded(*part) for part in parts], expand_composites=True)
        for number, parts in of_workers
        if number
    ]
    return tf.nest.map_structure(_joined, *batches)


def uneven_parts(total: int, workers: int) -> list[int]:
    """Rows of each worker, as uneven as can be: one for each, and all others for the last but none."""
    parts = [1 if rank < total else 0 for rank in range(workers)]
    parts[min(workers, total) - 1] += max(total - workers, 0)
    return parts


def take(batch: Any, rows: slice) -> Any:
    """Returns some rows of a batch."""

    def taken(value: Any) -> Any:
        if isinstance(value, tf.SparseTensor):
            rest = value.dense_shape[1:]
            size = tf.concat([[rows.stop - rows.start], rest], 0)
            return tf.sparse.slice(value, tf.concat([[rows.start], tf.zeros_like(rest)], 0), size)
        if value is None or not len(value.shape):
            return value
        return value[rows]

    return tf.nest.map_structure(taken, batch)


def with_padding(batch: Any) -> Any:
    """Sets the second half of every other row of integers to 0, as where sequences of other lengths are padded.

    The first batch may happen to have no padding, but a loss that counts the valid entries has to be seen with some.
    """

    def padded(value: Any) -> Any:
        if not isinstance(value, tf.Tensor) or not value.dtype.is_integer or value.shape.rank < 2:
            return value
        rows, length = tf.range(tf.shape(value)[0]), tf.range(tf.shape(value)[1])
        valid = (rows[:, tf.newaxis] % 2 == 0) | (length[tf.newaxis] < (tf.shape(value)[1] + 1) // 2)
        return value * tf.cast(
            tf.reshape(valid, tf.concat([tf.shape(valid), tf.ones(value.shape.rank - 2, tf.int32)], 0)), value.dtype
        )

    return tf.nest.map_structure(padded, batch)


def _encoded(value: tf.Tensor) -> list[str]:
    return [value.dtype.name, base64.b64encode(tf.io.serialize_tensor(value).numpy()).decode()]


def _decoded(dtype: str, code: str) -> tf.Tensor:
    return tf.io.parse_tensor(base64.b64decode(code), tf.as_dtype(dtype))


def _joined(*values: Any) -> Any:
    if isinstance(values[0], tf.SparseTensor):
        size = tf.reduce_max([value.dense_shape[1:] for value in values], axis=0)
        return tf.sparse.concat(
            0, [tf.sparse.reset_shape(value, tf.concat([value.dense_shape[:1], size], 0)) for value in values]
        )
    if values[0] is None or not len(values[0].shape):
        return values[0]
    if isinstance(values[0], tf.RaggedTensor):
        return tf.concat(values, 0)
    # Each worker may have padded its sequences to its own longest one.
    size = tf.reduce_max([tf.shape(value)[1:] for value in values], axis=0)
    return tf.concat([_padded_to(size, value) for value in values], 0)


def _padded_to(size: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    missing = tf.concat([[0], size - tf.shape(value)[1:]], 0)
    if not tf.reduce_any(missing > 0):
        return value
    return tf.pad(value, tf.stack([tf.zeros_like(missing), missing], axis=1), constant_values=tf.zeros((), value.dtype))
