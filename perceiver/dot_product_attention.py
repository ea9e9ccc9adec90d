"""softmax(Q K^T) V with a backward pass of its own, which goes over the N x M weights as seldom as it can.

Automatic differentiation passes four times over tensors of N x M to get from the gradient of the weights to that of the
logits, dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij). The sum is also the product of a row of the output and of its gradient
(Dao et al., FlashAttention, arXiv:2205.14135, eq. 4 of appendix B), which are only as wide as a head: two passes are
left. On a CPU, where these passes and not the matrix products take half of the time of attention, it counts.
"""

from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import ops


@ops.custom_gradient
def dot_product_attention(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Any]:
    """softmax(Q K^T) V; the scale is already on Q.

    The softmax is computed in the dtype of the inputs: logits that a product in bfloat16 has rounded gain nothing from
    float32, but the two casts of an N x M tensor cost as much as a product.

    Args:
        queries: (B, H, N, d).
        keys: (B, H, M, d).
        values: (B, H, M, e).

    Returns:
        (B, H, N, e); `ops.custom_gradient` takes the second part of the pair away.
    """
    logits = ops.matmul(queries, _transpose(keys))
    # Keras warns of a softmax over one entry.
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
