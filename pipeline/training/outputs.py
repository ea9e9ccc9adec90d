"""Whether the outputs of a model of one's own can be logits.

A model with a softmax or a sigmoid at its end trains too, but the loss and the calibrated probabilities are others, and
accuracy suffers.
"""

import keras
import numpy as np
import tensorflow as tf

from pipeline.training.macs import CALLS, NotKnown, functions_of, graph_of

BOUNDED = {"Sigmoid": "between 0 and 1", "Tanh": "between -1 and 1"}
"""Operations whose results are bounded, by their type in a graph."""
UNCHANGING = ("Identity", "Cast", "Reshape", "Squeeze")
"""Operations whose result has the numbers of the first input."""


def fault_of_outputs(model: keras.Model, image_shape: tuple[int, int, int]) -> str | None:
    """What the outputs of a model are instead of logits, with the remedy; None if nothing is found.

    Args:
        model: Maps uint8 images (B, H, W, channels) to logits (B, K); built.
        image_shape: (H, W, channels).
    """
    images = np.random.default_rng(0).integers(0, 256, (4, *image_shape), np.uint8)
    found = keras.ops.convert_to_numpy(keras.ops.cast(model(images, training=False), "float32"))
    # In 16 bits each of the numbers is rounded.
    tolerance = 1e-4 if keras.backend.standardize_dtype(model.compute_dtype) == "float32" else 2e-2
    if (found >= 0).all() and (np.abs(found.sum(axis=1) - 1) < tolerance).all():
        return (
            "gives probabilities, which sum to 1: leave its softmax out, because the loss takes logits and has one of "
            "its own"
        )
    # To trace the graph takes longer, and most models give some larger numbers.
    if (np.abs(found) <= 1).all() and (last := _last_operation(graph_of(model, image_shape))) in BOUNDED:
        return (
            f"ends in a {last.lower()}, which keeps its outputs {BOUNDED[last]}: leave it out, because the loss takes "
            "logits of any size"
        )
    return None


def _last_operation(graph: tf.Graph) -> str:
    """The type of the operation that computes the first output of a graph, or of one that hides it."""
    tensor = graph.outputs[0]
    while True:
        operation = tensor.op
        if operation.type in UNCHANGING:
            tensor = operation.inputs[0]
        elif operation.type in CALLS:
            try:
                (called,) = functions_of(operation)
            except NotKnown:
                return operation.type
            tensor = called.outputs[tensor.value_index]
        else:
            return operation.type
