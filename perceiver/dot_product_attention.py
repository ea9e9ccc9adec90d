"""softmax(Q K^T) V with a backward pass of its own, which needs fewer passes over the N x M weights.

Automatic differentiation takes four passes over N x M tensors from the gradient of the weights to that of the logits,
dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij). The sum equals the product of a row of the output and its gradient (Dao et al.,
FlashAttention, arXiv:2205.14135, eq. 4 of appendix B), which are only as wide as a head, so that two passes remain. On
a CPU, where these passes rather than the matrix products take half of the time of attention, the difference matters.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import ops


def attention_of(implementation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of an implementation in `perceiver.implementations`; arguments as `dot_product_attention`."""
    return {"own": dot_product_attention, "automatic": _automatic, "library": _library}[implementation]


def _automatic(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    logits = ops.matmul(queries, _transpose(keys))
    weights = ops.softmax(logits) if logits.shape[-1] > 1 else ops.ones_like(logits)
    return ops.matmul(weights, values)


def _library(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    rows_first = [ops.swapaxes(x, 1, 2) for x in (queries, keys, values)]
    return ops.swapaxes(ops.dot_product_attention(*rows_first, scale=1.0), 1, 2)


@ops.custom_gradient
def dot_product_attention(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Any]:
    """softmax(Q K^T) V; Q is already scaled.

    The softmax is computed in the dtype of the inputs: logits from a bfloat16 product gain nothing from float32, and
    the two casts of an N x M tensor cost as much as a product.

    Args:
        queries: (B, H, N, d).
        keys: (B, H, M, d).
        values: (B, H, M, e).

    Returns:
        (B, H, N, e); `ops.custom_gradient` removes the second element of the pair.
    """
    logits = ops.matmul(queries, _transpose(keys))
    # Keras warns about a softmax over a single entry.
    weights = ops.softmax(logits) if logits.shape[-1] > 1 else ops.ones_like(logits)
    outputs = ops.matmul(weights, values)

    def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        d_outputs = args[0] if upstream is None else upstream
        with keras.name_scope("attention_gradient"):
            d_values = ops.matmul(_transpose(weights), d_outputs)
            mean = ops.sum(d_outputs * outputs, axis=-1, keepdims=True)
            d_logits = weights * (ops.matmul(d_outputs, _transpose(values)) - mean)
            return ops.matmul(d_logits, keys), ops.matmul(_transpose(d_logits), queries), d_values

    return outputs, gradient


def _transpose(x: Tensor) -> Tensor:
    return ops.swapaxes(x, -2, -1)
