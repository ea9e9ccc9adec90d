"""Trains a Keras model of your own with this pipeline instead of its Perceiver, on the digits of scikit-learn.

    python examples/own_model.py                                       # starts Ray on this machine; about a minute
    python examples/own_model.py cifar100 --train.epochs 10            # the pipeline's presets and settings
    python examples/own_model.py cifar100 --data.source files --data.path ~/flowers --data.image-size 64

The pipeline verifies, splits and shards the data, feeds and augments them, trains on Ray Train workers in steps that
are exactly those of one process, writes checkpoints, and evaluates. When it is cut off, the same command goes on from
there. `ray_train_own_model.py` is for a training loop of your own instead, with nothing of the pipeline around it.
"""

import sys
from collections.abc import Sequence
from typing import Any

from pipeline.own_model import OwnModel, own_model_command

DEFAULTS = ["quickstart", "--train.epochs", "10"]


def small_cnn(
    image_shape: tuple[int, int, int],
    num_classes: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    channels: int = 32,
) -> Any:
    """From uint8 images (B, H, W, C) to logits (B, num_classes). The pixel statistics are for values in 0..1."""
    import keras

    layers = keras.layers
    images = keras.Input(image_shape, dtype="uint8")
    variance = [(255 * std) ** 2 for std in pixel_std]
    x = layers.Normalization(mean=[255 * mean for mean in pixel_mean], variance=variance)(images)
    for width in (channels, 2 * channels):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)  # the pipeline makes it use the moments of all workers
        x = layers.MaxPooling2D()(layers.ReLU()(x))
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(images, layers.Dense(num_classes, dtype="float32", name="logits")(x))


if __name__ == "__main__":
    sys.exit(own_model_command(OwnModel(small_cnn, {"channels": 32}), sys.argv[1:] or DEFAULTS))
