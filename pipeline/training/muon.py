"""The Muon optimizer (Jordan et al., 2024) for matrices and convolutions, with its iterations in bfloat16."""

import math
import re
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import ops


@keras.saving.register_keras_serializable(package="pipeline")
class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon`, which orthogonalises the momentum of matrices, with three changes.

    - The kernel of a convolution, (height, width, in, out), counts as a matrix of height * width * in rows, as in the
      authors' code. Keras updates it with AdamW.
    - The iterations run in bfloat16, as in the authors' code, which is precise enough: their coefficients leave the
      singular values between 0.7 and 1.2 anyway. A tall matrix is not transposed first.
    - An iteration multiplies by one polynomial, and an update by one number, which is fewer passes over the weights
      (docs/results.md).
    """

    def build(self, variables: list[Any]) -> None:
        super().build(variables)
        for i, variable in enumerate(variables):
            if len(variable.shape) == 4 and not any(re.search(name, variable.path) for name in self.exclude_layers):
                self.adam_velocities[i] = None  # Keras applies Muon to the variables without an Adam velocity

    def lr_adjust(self, x: Tensor) -> Tensor:
        """Scales an update so that its elements are as large as Adam's (Liu et al., 2025, arXiv:2502.16982)."""
        *rows, columns = x.shape
        return x if self.rms_rate is None else x * (math.sqrt(max(math.prod(rows), columns)) * self.rms_rate)

    def zeropower_via_newtonschulz5(self, x: Tensor, steps: int) -> Tensor:
        """(..., n) -> (..., n) in the same dtype, which has all singular values near 1 as a matrix of n columns.

        With the Gram matrix A of x, x' = (a I + b A + c A^2) x.
        """
        shape, dtype = x.shape, x.dtype
        x = ops.reshape(x, (-1, shape[-1]))
        is_tall = x.shape[0] > x.shape[1]
        identity = ops.eye(min(x.shape), dtype="bfloat16")
        a, b, c = self.muon_a * identity, self.muon_b * identity, self.muon_c
        x = ops.cast(x / (ops.norm(x) + 1e-7), "bfloat16")
        for _ in range(steps):
            # The smaller of the two Gram matrices: the result is the same on either side of x.
            gram = ops.matmul(ops.transpose(x), x) if is_tall else ops.matmul(x, ops.transpose(x))
            polynomial = a + ops.matmul(gram, b + c * gram)
            x = ops.matmul(x, polynomial) if is_tall else ops.matmul(polynomial, x)
        return ops.reshape(ops.cast(x, dtype), shape)
