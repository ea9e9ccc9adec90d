"""Counts the multiply-accumulates of a model in TensorFlow's graph of it."""

import math
import re

import keras
import tensorflow as tf

from perceiver import cost
from perceiver.config import PerceiverConfig
from pipeline.training.own_model import OwnModel

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
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
"""Operations that call one function once."""


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
    try:
        return _macs_of_graph(graph_of(model, image_shape))
    except NotKnown:
        return None


def graph_of(model: keras.Model, image_shape: tuple[int, int, int]) -> tf.Graph:
    """TensorFlow's graph of the forward pass of one uint8 image."""
    function = tf.function(lambda images: model(images, training=False), autograph=False)
    return function.get_concrete_function(tf.TensorSpec((1, *image_shape), tf.uint8)).graph


class NotKnown(Exception):
    """The graph does not tell how many multiply-accumulates there are."""


def _macs_of_graph(graph: tf.Graph) -> int:
    total = 0
    for operation in graph.get_operations():
        inner = [_macs_of_graph(function) for function in functions_of(operation)]
        if operation.type in CALLS:  # as grouped convolutions are
            total += sum(inner)
        elif any(inner):
            raise NotKnown  # a loop or a condition
        else:
            total += _macs_of_operation(operation)
    return total


def functions_of(operation: tf.Operation) -> list[tf.Graph]:
    """The graphs of the functions that an operation calls.

    Raises:
        NotKnown: if the graph does not contain one of them.
    """
    names = []
    for attribute in operation.op_def.attr:
        if attribute.type in ("func", "list(func)"):
            value = operation.get_attr(attribute.name)
            names += [function.name for function in (value if attribute.type == "list(func)" else [value])]
    # TensorFlow has no public way from an operation to the functions that it calls.
    functions = [operation.graph._get_function(name) for name in names if name]
    if None in functions:
        raise NotKnown
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
        raise NotKnown
    return 0


def _shape(tensor: tf.Tensor) -> list[int]:
    if not tensor.shape.is_fully_defined():
        raise NotKnown
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
