"""Gradients that a `train_step` changes itself"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from case_registry import DIFFERS, Result, T, Worker, X, case, fitted
from cases_steps import Guided


class ChangesGradients(Guided):
    """A model with a `train_step` that changes the gradients before it gives them to the optimizer."""

    def __init__(self, change: Callable[[list[Any]], list[Any]]) -> None:
        super().__init__()
        self.change = change

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = self.change(tape.gradient(loss, self.trainable_variables))
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


# The first rows have smaller gradients than the norm, and others have greater ones.
LIMIT = 20.0
TARGETS = T.copy()
TARGETS[20:] *= 30


@case(f"{DIFFERS}gradient.*global_clipnorm")
def clipping_by_global_norm_in_the_step(worker: Worker) -> Result:
    """a `train_step` that calls `tf.clip_by_global_norm`, though the first rows are not clipped"""
    clip = lambda gradients: tf.clip_by_global_norm(gradients, LIMIT)[0]  # noqa: E731
    return fitted(worker.compiled(lambda: ChangesGradients(clip), "mse"), X, TARGETS, shuffle=False)


@case(f"{DIFFERS}gradient.*clipnorm")
def clipping_by_norm_in_the_step(worker: Worker) -> Result:
    """a `train_step` that calls `tf.clip_by_norm`, though the first rows are not clipped"""
    clip = lambda gradients: [tf.clip_by_norm(gradient, LIMIT) for gradient in gradients]  # noqa: E731
    return fitted(worker.compiled(lambda: ChangesGradients(clip), "mse"), X, TARGETS, shuffle=False)
