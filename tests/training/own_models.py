"""Builders of small models of one's own, for the tests."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

ImageShape = tuple[int, int, int]


def convolutional(
    image_shape: ImageShape,
    num_classes: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    channels: int = 4,
    norm: bool = True,
) -> keras.Model:
    images = keras.Input(image_shape, dtype="uint8")
    x = layers.Rescaling(1 / 64, offset=-1)(images)
    x = layers.Conv2D(channels, 3, strides=2, padding="same", name="convolution")(x)
    if norm:
        x = layers.BatchNormalization()(x)
    x = layers.DepthwiseConv2D(2, name="depthwise")(layers.ReLU()(x))
    x = layers.Dense(6, name="dense")(layers.Flatten()(x))
    return keras.Model(images, layers.Dense(num_classes, dtype="float32", name="head")(x))


def attending(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    """With Keras's own attention, whose products are `Einsum`."""
    images = keras.Input(image_shape, dtype="uint8")
    rows = layers.Reshape((image_shape[0], -1))(layers.Rescaling(1 / 255)(images))
    x = layers.MultiHeadAttention(num_heads=2, key_dim=3, value_dim=5)(rows, rows)
    return keras.Model(images, layers.Dense(num_classes)(layers.GlobalAveragePooling1D()(x)))


def with_too_few_logits(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    images = keras.Input(image_shape, dtype="uint8")
    return keras.Model(images, layers.Dense(num_classes - 1)(layers.Flatten()(layers.Rescaling(1)(images))))


def no_model(**_: Any) -> str:
    return "a model"


def failing(**_: Any) -> keras.Model:
    raise RuntimeError("no such layer")
