"""Gradients that travel in bfloat16: half of the bytes, with what the rounding has left out added to the next step.

Without that, a gradient that is small beside what it is added to would be lost in every step anew. With it the sum of
what was sent follows the sum of the gradients, to within one rounding of the last step (error feedback: Seide et al.,
2014; Karimireddy et al., arXiv:1901.09847). The sums of the ring itself are rounded too, by as much as one addition in
bfloat16 for each worker; that is not fed back, and has no direction.
"""

from typing import Any

import keras
import tensorflow as tf

from .one_replica import OneReplica
from .vectors import packed, unpacked


def rounded(vector: tf.Tensor, owed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What is sent of a vector and of what is owed from before, in bfloat16, and what is owed then, in float32.

    What is not finite is sent as it is, so that a loss scale sees it, and owes nothing.
    """
    wanted = vector + owed
    sent = tf.cast(wanted, tf.bfloat16)
    left = wanted - tf.cast(sent, tf.float32)
    return sent, tf.where(tf.math.is_finite(left), left, tf.zeros_like(left))


class BFloat16Replica(OneReplica):
    """`OneReplica` whose gradients are summed in bfloat16, but for the comparisons of the first step.

    Each worker has a vector of its own with what it owes. It is not part of a checkpoint: a training that goes on, and
    one whose number of workers changes, has lost the rounding of a single step.

    Args:
        model: The model, built; all of its trainable variables are updated at once.

    Raises:
        ValueError: if the model is not built; in a step, if an optimizer gets the gradients of some variables only.
    """

    def __init__(self, model: keras.Model, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._model = model
        if not model.built or not model.trainable_variables:
            raise ValueError(
                "gradient_dtype='bfloat16' of a model that is not built: build it before multiworker.enable"
            )
        self.begin_training()

    def begin_training(self) -> None:
        """Owes nothing for the variables that are trainable now: layers may have been frozen or unfrozen."""
        # Each worker assigns its own, without an aggregation, so it is a variable of this process alone.
        count = sum(tf.TensorShape(variable.shape).num_elements() for variable in self._model.trainable_variables)
        self._owed = tf.Variable(tf.zeros([count]), trainable=False)

    def _means_over_replicas(self, dense: list[tf.Tensor], requested: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        if self.alone or self.recorded is not None:
            return super()._means_over_replicas(dense, requested)
        weight = tf.cast(self._of_replica.rows, tf.float32)
        weighted = [tf.math.multiply_no_nan(tf.cast(gradient, tf.float32), weight) for gradient in dense]
        vector = packed(weighted)
        if vector.shape[0] != self._owed.shape[0]:
            raise ValueError(
                f"gradient_dtype='bfloat16': an optimizer gets {vector.shape[0]} of the gradients of "
                f"{self._owed.shape[0]} trainable values: it must get all at once; take 'float32'"
            )
        sent, owed = rounded(vector, self._owed.read_value())
        with tf.control_dependencies([self._owed.assign(owed, read_value=False)]):
            sent = self.note("reduce", tf.identity(sent))
        summed = tf.cast(self.sum(sent), tf.float32)
        # Numbers of rows above 256 are not exact in bfloat16.
        counts = self.sum(tf.stack([weight, tf.cast(requested, tf.float32)]))
        summed, counts = self.note("reduced", [summed, counts])
        totals = unpacked(summed, weighted)
        means = [tf.cast(total / counts[0], gradient.dtype) for total, gradient in zip(totals, dense, strict=True)]
        return means, tf.cast(counts[1], requested.dtype)
