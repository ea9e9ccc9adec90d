"""Image classifiers of other kinds, in Keras, to compare the Perceiver with; builders for `pipeline.own_model`.

    cnn        airbench94's network (Jordan, 2024, arXiv:2404.00498), without its whitened first convolution, its frozen
               parts and its look-ahead
    resnet9    the ResNet-9 of DAWNBench's CIFAR-10 entries (Page, 2019), at half its width
    cct        CCT-2/3x2 (Hassani et al., 2021, arXiv:2104.05704): two convolutions, two blocks, sequence pooling
    vit        4 x 4 patches and as many blocks as cost what the preset `cifar100` does; the mean over tokens
    perceiver  a preset of this project, by name

The blocks of `cct` and `vit` are the self-attention blocks of this project, with its attention, LayerNorm and GELU, so
that a difference in speed is none of the implementation. They have their LayerNorms before attention and MLP, biases
on queries, keys and values, and neither dropout nor stochastic depth, which short trainings do not need. All resize the
images on the device if they are given `resize_to`, the side in pixels, as a Perceiver does.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import keras
from keras import layers

from perceiver import Perceiver, presets
from perceiver.blocks import SelfAttentionBlock
from perceiver.gelu import gelu
from perceiver.normalization import LayerNorm
from perceiver.position_encoding import LearnedPositionEncoding
from perceiver.preprocessing import ImageNormalization, PatchStem

ImageShape = tuple[int, int, int]
Statistics = Sequence[float] | None
# Running moments over the last few dozen steps: trainings are short.
MOMENTUM = 0.9


def cnn(
    image_shape: ImageShape,
    num_classes: int,
    pixel_mean: Statistics = None,
    pixel_std: Statistics = None,
    widths: Sequence[int] = (64, 256, 256),
    resize_to: int | None = None,
) -> keras.Model:
    """airbench94: a 2 x 2 convolution, then for each width a 3 x 3 convolution, pooling and another convolution."""
    images, x = _normalized(image_shape, pixel_mean, pixel_std, resize_to)
    x = _gelu(layers.Conv2D(24, 2, padding="valid")(x))
    for width in widths:
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D(2)(x)
        x = _gelu(_batch_norm(x))
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = _gelu(_batch_norm(x))
    return _classifier(images, layers.GlobalMaxPooling2D()(x), num_classes)


def resnet9(
    image_shape: ImageShape,
    num_classes: int,
    pixel_mean: Statistics = None,
    pixel_std: Statistics = None,
    width: int = 32,
    resize_to: int | None = None,
) -> keras.Model:
    """Three convolutions with pooling that double the channels, and a residual pair after the first and the last."""
    images, x = _normalized(image_shape, pixel_mean, pixel_std, resize_to)

    def convolution(x: Any, channels: int) -> Any:
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(_batch_norm(x))

    x = convolution(x, width)
    for factor, has_residual in ((2, True), (4, False), (8, True)):
        x = layers.MaxPooling2D(2)(convolution(x, factor * width))
        if has_residual:
            x = layers.Add()([x, convolution(convolution(x, factor * width), factor * width)])
    return _classifier(images, layers.GlobalMaxPooling2D()(x), num_classes)


def cct(
    image_shape: ImageShape,
    num_classes: int,
    pixel_mean: Statistics = None,
    pixel_std: Statistics = None,
    width: int = 128,
    blocks: int = 2,
    heads: int = 2,
    resize_to: int | None = None,
) -> keras.Model:
    """CCT-2/3x2: two 3 x 3 convolutions, each pooled, to tokens; learned positions, blocks, pooling by attention."""
    images, x = _normalized(image_shape, pixel_mean, pixel_std, resize_to)
    for channels in (width // 2, width):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
        # ReLU commutes with the pooling and comes after it, where it is a quarter of the work.
        x = layers.ReLU()(layers.MaxPooling2D(3, strides=2, padding="same")(x))
    x = _blocks(layers.Reshape((-1, width))(x), blocks, heads, widening_factor=1)
    weights = layers.Softmax(axis=1)(layers.Dense(1, name="pooling")(x))  # of each token
    return _classifier(images, layers.Flatten()(layers.Dot(axes=1)([weights, x])), num_classes)


def vit(
    image_shape: ImageShape,
    num_classes: int,
    pixel_mean: Statistics = None,
    pixel_std: Statistics = None,
    width: int = 128,
    blocks: int = 8,
    heads: int = 4,
    patch_size: int = 4,
    resize_to: int | None = None,
) -> keras.Model:
    """Patches that are projected, learned positions, blocks with MLPs of twice the width, the mean over tokens."""
    images, x = _normalized(image_shape, pixel_mean, pixel_std, resize_to)
    x = _blocks(PatchStem(patch_size, width)(x), blocks, heads, widening_factor=2)
    return _classifier(images, layers.GlobalAveragePooling1D()(x), num_classes)


def perceiver(
    image_shape: ImageShape,
    num_classes: int,
    pixel_mean: Statistics = None,
    pixel_std: Statistics = None,
    preset: str = "cifar100",
    **changes: Any,
) -> keras.Model:
    """A preset of this project with some settings changed."""
    config = replace(
        getattr(presets, preset)(),
        image_shape=image_shape,
        num_classes=num_classes,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        **changes,
    )
    model = Perceiver(**asdict(config))
    model.build((None, *image_shape))
    return model


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    builder.__name__: builder for builder in (perceiver, cnn, resnet9, cct, vit)
}


@keras.saving.register_keras_serializable(package="comparison")
class Gelu(layers.Layer):
    """This project's GELU, whose backward pass is quicker than Keras's."""

    def call(self, inputs: Any) -> Any:
        return gelu(inputs)


def _gelu(x: Any) -> Any:
    return Gelu()(x)


def _normalized(
    image_shape: ImageShape, pixel_mean: Statistics, pixel_std: Statistics, resize_to: int | None
) -> tuple[Any, Any]:
    images = keras.Input(image_shape, dtype="uint8")
    x = ImageNormalization(pixel_mean, pixel_std)(images)
    return images, x if resize_to is None else layers.Resizing(resize_to, resize_to)(x)


def _batch_norm(x: Any) -> Any:
    return layers.BatchNormalization(momentum=MOMENTUM, epsilon=1e-5)(x)


def _blocks(x: Any, count: int, heads: int, widening_factor: int) -> Any:
    x = LearnedPositionEncoding(x.shape[1])(x)
    for _ in range(count):
        x = SelfAttentionBlock(heads, widening_factor=widening_factor)(x)
    return LayerNorm()(x)


def _classifier(images: Any, features: Any, num_classes: int) -> keras.Model:
    return keras.Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(features))
