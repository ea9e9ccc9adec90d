"""The Muon optimizer (Jordan et al., 2024) for matrices and convolutions, with its iterations in bfloat16."""

import re
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import ops


@keras.saving.register_keras_serializable(package="pipeline")
class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon`, which orthogonalises the momentum of matrices, with two changes after the authors' code.

    - The kernel of a convolution, (height, width, in, out), counts as a matrix of height * width * in rows. Keras
      updates it with AdamW.
    - The iterations run in bfloat16, which is precise enough: their coefficients leave the singular values between 0.7
      and 1.2 anyway. A tall matrix is not transposed first. On a CPU with matrix units for bfloat16, a training step
      takes a fifth longer than with AdamW (docs/results.md).
    """

    def build(self, variables: list[Any]) -> None:
        super().build(variables)
        for i, variable in enumerate(variables):
            if len(variable.shape) == 4 and not any(re.search(name, variable.path) for name in self.exclude_layers):
                self.adam_velocities[i] = None  # Keras applies Muon to the variables without an Adam velocity

    def lr_adjust(self, x: Tensor) -> Tensor:
        """Scales an update so that its elements are as large as Adam's (Liu et al., 2025, arXiv:2502.16982)."""
        return ops.reshape(super().lr_adjust(_matrix(x)), x.shape)

    def zeropower_via_newtonschulz5(self, x: Tensor, steps: int) -> Tensor:
        """(..., n) -> (..., n) in the same dtype, which has all singular values near 1 as a matrix of n columns."""
        shape, dtype = x.shape, x.dtype
        x = _matrix(x)
        is_tall = x.shape[0] > x.shape[1]
        a, b, c = self.muon_a, self.muon_b, self.muon_c
        x = ops.cast(x / (ops.norm(x) + 1e-7), "bfloat16")
        for _ in range(steps):
            # The smaller of the two Gram matrices: the result is the same on either side of x.
            gram = ops.matmul(ops.transpose(x), x) if is_tall else ops.matmul(x, ops.transpose(x))
            polynomial = b * gram + c * ops.matmul(gram, gram)
            x = a * x + (ops.matmul(x, polynomial) if is_tall else ops.matmul(polynomial, x))
        return ops.reshape(ops.cast(x, dtype), shape)


def _matrix(x: Tensor) -> Tensor:
    return ops.reshape(x, (-1, x.shape[-1]))
