"""Builds the model to be trained, a Perceiver or a model of one's own, and counts its multiply-accumulates."""

import math
from dataclasses import asdict

import keras
import tensorflow as tf

from perceiver import cost
from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import OwnModelError


def build_model(config: PerceiverConfig | OwnModel) -> keras.Model:
    """A built model that is not compiled.

    Raises:
        OwnModelError: if a model of one's own cannot be built, or does not give logits of all classes.
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
    return model


def macs_of(config: PerceiverConfig | OwnModel, model: keras.Model) -> int:
    """Multiply-accumulates of the forward pass of one image."""
    return cost.macs_per_image(config) if isinstance(config, PerceiverConfig) else count_macs(model, config.image_shape)


def count_macs(model: keras.Model, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of all matrix products and convolutions in the forward pass of one uint8 image.

    Counted in TensorFlow's graph of the model. Operations within loops and conditions of the graph are not found, nor
    those whose shapes are known only when they run.
    """
    function = tf.function(lambda images: model(images, training=False), autograph=False)
    graph = function.get_concrete_function(tf.TensorSpec((1, *image_shape), tf.uint8)).graph
    return sum(_macs_of_operation(operation) for operation in graph.get_operations())


def _macs_of_operation(operation: tf.Operation) -> int:
    if operation.type not in ("MatMul", "BatchMatMulV2", "Conv2D", "DepthwiseConv2dNative", "Einsum"):
        return 0
    shapes = [tensor.shape for tensor in (*operation.inputs, *operation.outputs)]
    if not all(shape.is_fully_defined() for shape in shapes):
        return 0
    first, second, output = shapes
    if operation.type == "MatMul":
        return output.num_elements() * first[0 if operation.get_attr("transpose_a") else 1]
    if operation.type == "BatchMatMulV2":
        return output.num_elements() * first[-2 if operation.get_attr("adj_x") else -1]
    if operation.type == "Conv2D":
        return output.num_elements() * math.prod(second[:3])
    if operation.type == "DepthwiseConv2dNative":
        return output.num_elements() * math.prod(second[:2])
    inputs = operation.get_attr("equation").decode().partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for labels, shape in zip(inputs, shapes, strict=False):
        sizes |= zip(labels, shape, strict=True)
    return math.prod(sizes.values())
