"""Builders of small models of one's own, for the tests."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
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


def with_a_softmax(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    images = keras.Input(image_shape, dtype="uint8")
    return keras.Model(
        images, layers.Dense(num_classes, "softmax")(layers.Flatten()(layers.Rescaling(1 / 255)(images)))
    )


def with_a_sigmoid(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    return keras.Sequential([convolutional(image_shape, num_classes, (), ()), layers.Activation("sigmoid")])


def within_a_function(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    """A model whose last activation is in a function of TensorFlow."""

    class Bounded(layers.Layer):
        @tf.function
        def call(self, x: Any) -> Any:
            return tf.cast(tf.tanh(x), tf.float32)

    return keras.Sequential([convolutional(image_shape, num_classes, (), ()), Bounded()])


class Activated(layers.Layer):
    """Has a function, of which Keras knows no name."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


class Sized(layers.Layer):
    def __init__(self, settings: object) -> None:
        super().__init__()

    def call(self, x: Any) -> Any:
        return x


class WithoutConfig(layers.Layer):
    def call(self, x: Any) -> Any:
        return x

    def get_config(self) -> dict[str, Any]:
        raise RuntimeError("no config")


def with_a_function(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    return _small(image_shape, num_classes, Activated(lambda x: keras.ops.maximum(x, 0)))


def with_settings(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    return _small(image_shape, num_classes, Sized(object()))


def with_a_bad_config(image_shape: ImageShape, num_classes: int, **_: Any) -> keras.Model:
    return _small(image_shape, num_classes, WithoutConfig())


def no_model(**_: Any) -> str:
    return "a model"


def failing(**_: Any) -> keras.Model:
    raise RuntimeError("no such layer")


@keras.saving.register_keras_serializable(package="tests")
class NaNInEvaluation(layers.Layer):
    """Gives NaN in evaluation until it has been trained for `steps`, as moving statistics that have not settled."""

    def __init__(self, steps: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps = steps

    def build(self, shape: Any) -> None:
        self.taken = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="float32", name="taken")

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.taken.assign_add(1.0)
            return x
        return keras.ops.where(self.taken < self.steps, x * float("nan"), x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "steps": self.steps}


def nan_at_first(image_shape: Any, num_classes: int, **_: Any) -> keras.Model:
    return _small(image_shape, num_classes, NaNInEvaluation(5))


def nan_always(image_shape: Any, num_classes: int, **_: Any) -> keras.Model:
    return _small(image_shape, num_classes, NaNInEvaluation(10**6))


def weights_in_bfloat16(image_shape: Any, num_classes: int, **_: Any) -> keras.Model:
    return _small(image_shape, num_classes, layers.Dense(8, dtype="bfloat16"))


def _small(image_shape: Any, num_classes: int, layer: layers.Layer) -> keras.Model:
    images = keras.Input(image_shape, dtype="uint8")
    features = layer(layers.Flatten()(layers.Rescaling(1 / 255)(images)))
    return keras.Model(images, layers.Dense(num_classes, name="logits", dtype="float32")(features))
