"""Builds the model to be trained, a Perceiver or a model of one's own, and counts its multiply-accumulates."""

import math
import re
from dataclasses import asdict

import keras
import numpy as np
import tensorflow as tf

from perceiver import cost
from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import OwnModelError

KERNEL_RANKS = {
    "Conv2D": 3,
    "Conv2DBackpropInput": 3,
    "Conv3D": 4,
    "Conv3DBackpropInputV2": 4,
    "DepthwiseConv2dNative": 2,
}
"""How many dimensions of its kernel make up what a convolution multiplies for one number of its output."""
OTHER_PRODUCTS = re.compile("MatMul|Conv|Einsum|RNN|GRU|LSTM|XlaDot|PyFunc")
"""In the type of an operation with products that are not counted, or perhaps: Python functions can have them."""


def build_model(config: PerceiverConfig | OwnModel) -> keras.Model:
    """A built model that is not compiled.

    Raises:
        OwnModelError: if a model of one's own cannot be built, or does not give logits of all classes, but
            probabilities for instance.
    """
    if isinstance(config, PerceiverConfig):
        model = Perceiver(**asdict(config))
        model.build((None, *config.image_shape))
        return model
    try:
        model = config.build()
    except Exception as error:
        raise OwnModelError(f"the builder {config.name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, keras.Model):
        raise OwnModelError(f"the builder {config.name} returns {type(model).__name__}: return a keras.Model")
    try:
        logits = model(keras.KerasTensor((None, *config.image_shape), "uint8"))
    except Exception as error:
        raise OwnModelError(
            f"the model of {config.name} does not take uint8 images {config.image_shape}: {type(error).__name__}: "
            f"{error}"
        ) from error
    shape = getattr(logits, "shape", None)
    if shape != (None, config.num_classes):
        raise OwnModelError(
            f"the model of {config.name} gives {shape or type(logits).__name__}: it should give logits "
            f"{(None, config.num_classes)}"
        )
    if _gives_probabilities(model, config.image_shape):
        raise OwnModelError(
            f"the model of {config.name} gives probabilities, which sum to 1: leave its softmax out, because the loss "
            "takes logits and has one of its own"
        )
    return model


def _gives_probabilities(model: keras.Model, image_shape: tuple[int, int, int]) -> bool:
    """Whether the outputs of a model, for images of noise, are what a softmax gives.

    With a second softmax a model trains too, but the loss and the calibrated probabilities are others, and accuracy
    suffers.
    """
    images = np.random.default_rng(0).integers(0, 256, (4, *image_shape), np.uint8)
    found = keras.ops.convert_to_numpy(keras.ops.cast(model(images, training=False), "float32"))
    # In 16 bits each of the numbers is rounded.
    tolerance = 1e-4 if keras.backend.standardize_dtype(model.compute_dtype) == "float32" else 2e-2
    return bool((found >= 0).all() and (np.abs(found.sum(axis=1) - 1) < tolerance).all())


def macs_of(config: PerceiverConfig | OwnModel, model: keras.Model) -> int | None:
    """Multiply-accumulates of the forward pass of one image; None if they are not known."""
    return cost.macs_per_image(config) if isinstance(config, PerceiverConfig) else count_macs(model, config.image_shape)


def count_macs(model: keras.Model, image_shape: tuple[int, int, int]) -> int | None:
    """Multiply-accumulates of all matrix products and convolutions in the forward pass of one uint8 image.

    Counted in TensorFlow's graph of the model and in the functions that it calls. Products of single elements are not
    counted, even where their sum amounts to a matrix product, nor are Fourier transforms and resizing.

    Returns:
        An integer; None if there are products whose number the graph does not tell: within a loop, as in recurrent
        layers that are not unrolled, or a condition; of shapes that are known only when they run; in an operation that
        is not known here or calls Python.
    """
    function = tf.function(lambda images: model(images, training=False), autograph=False)
    try:
        return _macs_of_graph(function.get_concrete_function(tf.TensorSpec((1, *image_shape), tf.uint8)).graph)
    except _NotKnown:
        return None


class _NotKnown(Exception):
    """The graph does not tell how many multiply-accumulates there are."""


def _macs_of_graph(graph: tf.Graph) -> int:
    total = 0
    for operation in graph.get_operations():
        inner = [_macs_of_graph(function) for function in _functions_of(operation)]
        if operation.type in ("PartitionedCall", "StatefulPartitionedCall"):  # as grouped convolutions are
            total += sum(inner)
        elif any(inner):
            raise _NotKnown  # a loop or a condition
        else:
            total += _macs_of_operation(operation)
    return total


def _functions_of(operation: tf.Operation) -> list[tf.Graph]:
    """The graphs of the functions that an operation calls."""
    names = []
    for attribute in operation.op_def.attr:
        if attribute.type in ("func", "list(func)"):
            value = operation.get_attr(attribute.name)
            names += [function.name for function in (value if attribute.type == "list(func)" else [value])]
    # TensorFlow has no public way from an operation to the functions that it calls.
    functions = [operation.graph._get_function(name) for name in names if name]
    if None in functions:
        raise _NotKnown
    return [function.graph for function in functions]


def _macs_of_operation(operation: tf.Operation) -> int:
    kind, inputs, output = operation.type, operation.inputs, operation.outputs[0] if operation.outputs else None
    if kind in KERNEL_RANKS:
        # A transposed convolution is the gradient of one whose output is its third input.
        result = inputs[2] if "Backprop" in kind else output
        return math.prod(_shape(result)) * math.prod(_shape(inputs[1])[: KERNEL_RANKS[kind]])
    if kind == "MatMul":
        return math.prod(_shape(output)) * _shape(inputs[0])[0 if operation.get_attr("transpose_a") else 1]
    if kind in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        return math.prod(_shape(output)) * _shape(inputs[0])[-2 if operation.get_attr("adj_x") else -1]
    if kind == "Einsum":
        return _macs_of_einsum(operation.get_attr("equation").decode(), [_shape(tensor) for tensor in inputs])
    if OTHER_PRODUCTS.search(kind):
        raise _NotKnown
    return 0


def _shape(tensor: tf.Tensor) -> list[int]:
    if not tensor.shape.is_fully_defined():
        raise _NotKnown
    return tensor.shape.as_list()


def _macs_of_einsum(equation: str, shapes: list[list[int]]) -> int:
    terms = equation.partition("->")[0].split(",")
    if len(terms) == 1:
        return 0  # a transposition or a sum
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        # The dimensions of an ellipsis are numbered from its end, by which they are broadcast.
        unnamed = range(len(shape) - len(before) - len(after) if dots else 0, 0, -1)
        for label, size in zip([*before, *map(str, unnamed), *after], shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 0))
    return math.prod(sizes.values())
