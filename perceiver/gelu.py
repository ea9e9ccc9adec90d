"""GELU with a backward pass of its own, in float32 inside: on a CPU a third of the derived one's time in bfloat16.

Automatic differentiation passes once over the rows for each elementary operation, in the dtype of the rows, and
TensorFlow computes erf and exp in bfloat16 slower than in float32, casts included.
"""

import math
from functools import cache
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import ops


def gelu(x: Tensor, approximate: bool = False) -> Tensor:
    """x Phi(x), Phi the normal distribution (Hendrycks & Gimpel, arXiv:1606.08415), or its approximation by a tanh.

    Args:
        x: of any shape and floating dtype, which is the result's too.
        approximate: whether to take the approximation.
    """
    return _gelu(approximate)(x)


@cache
def _gelu(approximate: bool) -> Any:
    @ops.custom_gradient
    def function(x: Tensor) -> tuple[Tensor, Any]:
        rows = ops.cast(x, "float32")
        factor = math.sqrt(2 / math.pi)
        if approximate:
            tanh = ops.tanh(rows * (factor + factor * 0.044715 * ops.square(rows)))
            probability = 0.5 + 0.5 * tanh
        else:
            probability = 0.5 + 0.5 * ops.erf(rows * math.sqrt(0.5))

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            with keras.name_scope("gelu_gradient"):
                if approximate:
                    slope = factor + 3 * factor * 0.044715 * ops.square(rows)
                    density = (0.5 - 0.5 * ops.square(tanh)) * slope
                else:
                    density = ops.exp(-0.5 * ops.square(rows)) * (0.5 * factor)
                d_outputs = ops.cast(args[0] if upstream is None else upstream, "float32")
                return ops.cast(d_outputs * (probability + rows * density), x.dtype)

        return ops.cast(rows * probability, x.dtype), gradient

    return function
