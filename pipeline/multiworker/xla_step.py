"""A training step that XLA compiles without the collectives, which it does not support on a CPU."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from .data import rows_of
from .keras_internals import get_keras_mask, replaced, set_keras_mask, tf_values_module
from .one_replica import OneReplica


def xla_train_step(model: keras.Model, replica: OneReplica) -> Callable[[Any], dict[str, tf.Tensor]]:
    """Returns the `train_step` of Keras, in which XLA compiles the forward and backward pass, and the update."""

    def compiled_update(apply: Callable[..., Any]) -> Callable[..., None]:
        def apply_compiled(optimizer: Any, gradients: list[Any], variables: list[Any] | None) -> None:
            @tf.function(jit_compile=True, autograph=False)
            def update(gradients: list[Any]) -> None:
                apply(optimizer, gradients, variables)

            # All workers have the same gradients by now, so nothing of an update needs another replica.
            with (
                replaced(replica.strategy.extended, "_use_merge_call", lambda: False),
                replaced(tf_values_module, "apply_aggregation_replica_context", lambda value, *_: value),
            ):
                update(gradients)

        return apply_compiled

    @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
    def forward_backward(x: Any, y: Any, sample_weight: Any) -> Any:
        with replaced(replica, "within_xla", True), tf.GradientTape() as tape:
            y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
            loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            scaled = model.optimizer.scale_loss(loss)
        masks = [get_keras_mask(output) for output in tf.nest.flatten(y_pred)]
        return y_pred, masks, loss, tape.gradient(scaled, model.trainable_weights)

    def train_step(data: Any) -> dict[str, tf.Tensor]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred, masks, loss, gradients = forward_backward(x, y, sample_weight)
        for output, mask in zip(tf.nest.flatten(y_pred), masks, strict=True):
            if mask is not None:  # the metrics need it, and an output that leaves a function has lost it
                set_keras_mask(output, mask)
        model._loss_tracker.update_state(loss, sample_weight=rows_of(x))
        with replaced(replica, "around_update", compiled_update):
            model.optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    return train_step
