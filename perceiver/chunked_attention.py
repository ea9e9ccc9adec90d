"""Attention over very many inputs in bounded memory: an online softmax over chunks of keys and values.

The online softmax is due to Milakov and Gimelshein (arXiv:1805.02867), its use in attention to Rabe and Staats
(arXiv:2112.05682). No N x M tensor is ever held: the backward pass recomputes the weights of each chunk.
"""

from typing import Any

from keras import KerasTensor as Tensor
from keras import ops

_MASKED = -1e9  # finite, so that a row that may attend nowhere does not become NaN
_SMALLEST_WEIGHT = 1e-30  # a smaller float32 loses precision or underflows
_FEW_KEYS = 64


def attention_logits(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Q K^T (B, H, N, M) in float32, with a large negative value where the boolean mask is false."""
    logits = ops.cast(ops.matmul(queries, _transpose(keys)), "float32")
    return logits if mask is None else ops.where(mask, logits, _MASKED)


def attention_weights(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of the logits, 0 where the mask is false; a row that may attend nowhere is 0 throughout."""
    # Keras warns about a softmax over a single entry.
    weights = ops.softmax(logits) if logits.shape[-1] > 1 else ops.exp(ops.log_softmax(logits))
    return weights if mask is None else ops.where(mask, weights, 0.0)


def chunked_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, chunk_size: int) -> Tensor:
    """softmax(Q K^T) V, `chunk_size` keys at a time; Q is already scaled.

    Args:
        queries: (B, H, N, d).
        keys: (B, H, M, d).
        values: (B, H, M, e).
        mask: boolean (B, 1, 1 or N, M), true where a row may attend, or None.
        chunk_size: Maximum number of keys processed at once; M need not be a multiple of it.

    Returns:
        (B, H, N, e) in the dtype of the values.
    """
    num_keys = keys.shape[2]
    chunk_size = even_chunk_size(num_keys, chunk_size)
    starts = range(0, num_keys, chunk_size)

    def rows_of(x: Tensor, start: int, after: Tensor | None) -> Tensor:
        """Rows of one chunk, with a data dependency on `after`.

        Without the dependency, TensorFlow's executor starts all chunks at once and holds them all. A gather is used
        because XLA takes minutes to compile a slice whose start depends on the data.
        """
        whole = num_keys // chunk_size
        if after is None or start // chunk_size == whole:
            return x[:, :, start : start + chunk_size]
        x = ops.reshape(x[:, :, : whole * chunk_size], (-1, x.shape[1], whole, chunk_size, x.shape[3]))
        nothing = ops.cast(ops.min(ops.square(after)) < 0, "int32")
        return ops.take(x, start // chunk_size + nothing, axis=2)

    def mask_of(start: int) -> Tensor | None:
        return None if mask is None else mask[..., start : start + chunk_size]

    @ops.custom_gradient
    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Any]:
        outputs, total = None, None
        totals: list[Tensor] = []
        # `total` is the log-sum-exp of the logits so far.
        for start in starts:
            logits = attention_logits(queries, rows_of(keys, start, outputs), mask_of(start))
            weights = attention_weights(logits, mask_of(start))
            totals.append(log_sum_exp(logits, weights))
            products = ops.matmul(ops.cast(weights, values.dtype), rows_of(values, start, outputs))
            products = ops.cast(products, "float32")
            if outputs is None:
                outputs, total = products, totals[-1]
            else:
                before, total = total, ops.logaddexp(total, totals[-1])
                outputs = ops.exp(before - total) * outputs + ops.exp(totals[-1] - total) * products
        outputs = ops.cast(outputs, values.dtype)

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
            d_outputs = ops.cast(args[0] if upstream is None else upstream, "float32")
            # The gradient of a softmax needs sum_j P_ij dP_ij, which is the product of the output and its gradient.
            mean = ops.sum(d_outputs * ops.cast(outputs, "float32"), axis=-1, keepdims=True)
            d_queries = None
            d_keys, d_values = [], []
            for start, chunk_total in zip(starts, totals, strict=True):
                chunk_keys = rows_of(keys, start, d_queries)
                weights = attention_weights(attention_logits(queries, chunk_keys, mask_of(start)), mask_of(start))
                # The chunk's share of the whole softmax multiplies the gradient, which is smaller than the weights.
                share = ops.exp(chunk_total - total)
                upstream_share = ops.cast(share * d_outputs, values.dtype)
                d_values.append(ops.matmul(_transpose(ops.cast(weights, values.dtype)), upstream_share))
                chunk_values = rows_of(values, start, d_queries)
                # P (dP - mean): the subtraction is an extra column of the product instead of a pass over N x M.
                ones = ops.ones_like(chunk_values[..., :1])
                d_weights = ops.matmul(
                    ops.concatenate([upstream_share, ops.cast(-share * mean, values.dtype)], -1),
                    _transpose(ops.concatenate([chunk_values, ones], -1)),
                )
                d_logits = weights * ops.cast(d_weights, "float32")
                d_logits = ops.cast(d_logits, keys.dtype)
                d_keys.append(ops.matmul(_transpose(d_logits), queries))
                products = ops.cast(ops.matmul(d_logits, chunk_keys), "float32")
                d_queries = products if d_queries is None else d_queries + products
            return ops.cast(d_queries, queries.dtype), ops.concatenate(d_keys, 2), ops.concatenate(d_values, 2)

        return outputs, gradient

    return attention(queries, keys, values)


def log_sum_exp(logits: Tensor, weights: Tensor) -> Tensor:
    """log(sum_j exp(l_j)), (B, H, N, 1), from logits l and weights w = softmax(l), as l_j - log(w_j) for any j.

    The j with the largest weight among the first few keys is used, unless that weight is too small: a maximum over all
    keys is another pass over N x M.
    """

    def among(num_keys: int | None) -> tuple[Tensor, Tensor]:
        logit = ops.max(logits[..., :num_keys], axis=-1, keepdims=True)
        return logit, ops.max(weights[..., :num_keys], axis=-1, keepdims=True)

    def total(logit: Tensor, weight: Tensor) -> Tensor:
        return logit - ops.log(ops.maximum(weight, _SMALLEST_WEIGHT))

    logit, weight = among(_FEW_KEYS)
    return ops.cond(
        ops.min(weight) > _SMALLEST_WEIGHT, lambda: total(logit, weight), lambda: total(*among(num_keys=None))
    )


def even_chunk_size(num_keys: int, chunk_size: int) -> int:
    """The largest divisor of the number of keys in (chunk_size / 2, chunk_size], or `chunk_size` if there is none.

    With a remainder, all keys and values except the remainder are copied.
    """
    sizes = range(min(chunk_size, num_keys), chunk_size // 2, -1)
    return next((size for size in sizes if num_keys % size == 0), chunk_size)


def _transpose(x: Tensor) -> Tensor:
    return ops.swapaxes(x, -2, -1)
