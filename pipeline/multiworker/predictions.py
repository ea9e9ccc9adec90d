"""What the workers predict, put together: of any dtype, and with several rows for a row of the batch."""

import tensorflow as tf

# The collective operations of TensorFlow send neither small integers nor bfloat16, which layers of mixed precision
# return. Each of these types is sent as one that has all of its numbers.
_SENT_AS = {
    tf.bool: tf.int32,
    tf.uint8: tf.int32,
    tf.int8: tf.int32,
    tf.uint16: tf.int32,
    tf.int16: tf.int32,
    tf.uint32: tf.int64,
    tf.bfloat16: tf.float32,
}
OTHER_ROWS = (
    "the model predicts a tensor that has neither a row for each row of the batch nor as many rows for each, so that "
    "the predictions of the workers cannot be put together: return one row, or as many for each, or predict in one "
    "process"
)


def rows_that_count(output: tf.Tensor, rows: int | tf.Tensor, given: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the part of an output that belongs to the first `rows` of the `given` rows, and whether it has none such.

    An output may have several rows for each row of the batch, such as one for each step of a sequence.

    Raises:
        ValueError: if the output is known to have no rows of the batch.
    """
    output = tf.convert_to_tensor(output)
    size = output.shape[0] if output.shape.rank else None
    if output.shape.rank == 0 or (size is not None and not isinstance(given, int)):
        raise ValueError(f"{OTHER_ROWS} (its shape is {output.shape} for any batch)")
    size = tf.shape(output)[0] if size is None else size
    return output[: rows * (size // given)], tf.cast(size % given != 0, tf.float64)


def sent(output: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Tensors that collective operations send, and `received` turns back into the output."""
    dtype = output.dtype
    if dtype == tf.string:
        text = tf.strings.reduce_join(tf.reshape(output, [-1]))
        return tf.strings.length(output), tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32)
    if dtype.is_complex:
        return tf.math.real(output), tf.math.imag(output)
    if dtype == tf.uint64:
        return (tf.bitcast(output, tf.int64),)
    return (tf.cast(output, _SENT_AS.get(dtype, dtype)),)


def received(parts: tuple[tf.Tensor, ...], dtype: tf.DType) -> tf.Tensor:
    """The output of `dtype` that was sent as these parts."""
    if dtype == tf.string:
        lengths, codes = parts
        letters = tf.gather(tf.constant([bytes([code]) for code in range(256)]), codes)
        words = tf.RaggedTensor.from_row_lengths(letters, tf.reshape(lengths, [-1]))
        return tf.reshape(tf.strings.reduce_join(words, axis=-1), tf.shape(lengths))
    if dtype.is_complex:
        return tf.complex(*parts)
    return tf.bitcast(parts[0], dtype) if dtype == tf.uint64 else tf.cast(parts[0], dtype)
