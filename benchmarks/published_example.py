"""The published Keras example (Khalid Salama, 2021), the baseline of the presets, with its sizes as arguments.

The functions are those of the example. Two things differ: `patcher`, which the example never creates, is created here,
and no data set is read at import.
"""

from collections.abc import Sequence

import keras
from keras import activations, layers, ops

from perceiver import presets
from perceiver.cost import macs_per_image

# Multiply-accumulates per image. The example computes keys and values in each of its two iterations.
PUBLISHED_MACS = macs_per_image(presets.keras_example()) + 1024 * 256 * (256 + 256)


def create_ffn(hidden_units: Sequence[int], dropout_rate: float) -> keras.Sequential:
    ffn_layers = [layers.Dense(units, activation=activations.gelu) for units in hidden_units[:-1]]
    return keras.Sequential([*ffn_layers, layers.Dense(units=hidden_units[-1]), layers.Dropout(dropout_rate)])


class Patches(layers.Layer):
    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def call(self, images: keras.KerasTensor) -> keras.KerasTensor:
        size = (self.patch_size, self.patch_size)
        patches = ops.image.extract_patches(images, size=size, strides=size, dilation_rate=1, padding="valid")
        return ops.reshape(patches, [ops.shape(images)[0], -1, patches.shape[-1]])


class PatchEncoder(layers.Layer):
    def __init__(self, num_patches: int, projection_dim: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.projection = layers.Dense(units=projection_dim)
        self.position_embedding = layers.Embedding(input_dim=num_patches, output_dim=projection_dim)

    def call(self, patches: keras.KerasTensor) -> keras.KerasTensor:
        positions = ops.arange(start=0, stop=self.num_patches, step=1)
        return self.projection(patches) + self.position_embedding(positions)


def create_cross_attention_module(
    latent_dim: int, data_dim: int, projection_dim: int, ffn_units: Sequence[int], dropout_rate: float
) -> keras.Model:
    inputs = {
        "latent_array": layers.Input(shape=(latent_dim, projection_dim), name="latent_array"),
        "data_array": layers.Input(shape=(data_dim, projection_dim), name="data_array"),
    }
    latent_array = layers.LayerNormalization(epsilon=1e-6)(inputs["latent_array"])
    data_array = layers.LayerNormalization(epsilon=1e-6)(inputs["data_array"])
    query = layers.Dense(units=projection_dim)(latent_array)
    key = layers.Dense(units=projection_dim)(data_array)
    value = layers.Dense(units=projection_dim)(data_array)
    attention_output = layers.Attention(use_scale=True, dropout=0.1)([query, key, value])
    attention_output = layers.Add()([attention_output, latent_array])
    attention_output = layers.LayerNormalization(epsilon=1e-6)(attention_output)
    outputs = create_ffn(ffn_units, dropout_rate)(attention_output)
    return keras.Model(inputs=inputs, outputs=layers.Add()([outputs, attention_output]))


def create_transformer_module(
    latent_dim: int,
    projection_dim: int,
    num_heads: int,
    num_transformer_blocks: int,
    ffn_units: Sequence[int],
    dropout_rate: float,
) -> keras.Model:
    inputs = layers.Input(shape=(latent_dim, projection_dim))
    x0 = inputs
    for _ in range(num_transformer_blocks):
        x1 = layers.LayerNormalization(epsilon=1e-6)(x0)
        attention = layers.MultiHeadAttention(num_heads=num_heads, key_dim=projection_dim, dropout=0.1)
        x2 = layers.Add()([attention(x1, x1), x0])
        x3 = layers.LayerNormalization(epsilon=1e-6)(x2)
        x3 = create_ffn(ffn_units, dropout_rate)(x3)
        x0 = layers.Add()([x3, x2])
    return keras.Model(inputs=inputs, outputs=x0)


def create_data_augmentation(mean: Sequence[float], variance: Sequence[float], image_size: int) -> keras.Sequential:
    """The augmentation, with the `mean` and `variance` of each channel, which the example computes with `adapt`."""
    return keras.Sequential(
        [
            layers.Normalization(mean=mean, variance=variance),
            layers.Resizing(image_size, image_size),
            layers.RandomFlip("horizontal"),
            layers.RandomZoom(height_factor=0.2, width_factor=0.2),
        ],
        name="data_augmentation",
    )


class PublishedPerceiver(keras.Model):
    """The example's model, whose parts are created in the order in which they run.

    Without `data_augmentation` it takes images that are augmented already.
    """

    def __init__(
        self,
        patch_size: int,
        data_dim: int,
        latent_dim: int,
        projection_dim: int,
        num_heads: int,
        num_transformer_blocks: int,
        ffn_units: Sequence[int],
        dropout_rate: float,
        num_iterations: int,
        classifier_units: Sequence[int],
        data_augmentation: keras.Sequential | None = None,
    ) -> None:
        super().__init__()
        self.data_augmentation = data_augmentation
        self.num_iterations = num_iterations
        self.latent_array = self.add_weight(
            shape=(latent_dim, projection_dim), initializer="random_normal", trainable=True
        )
        self.patcher = Patches(patch_size)
        self.patch_encoder = PatchEncoder(data_dim, projection_dim)
        self.cross_attention = create_cross_attention_module(
            latent_dim, data_dim, projection_dim, ffn_units, dropout_rate
        )
        self.transformer = create_transformer_module(
            latent_dim, projection_dim, num_heads, num_transformer_blocks, ffn_units, dropout_rate
        )
        self.global_average_pooling = layers.GlobalAveragePooling1D()
        self.classification_head = create_ffn(classifier_units, dropout_rate)

    def call(self, images: keras.KerasTensor) -> keras.KerasTensor:
        augmented = images if self.data_augmentation is None else self.data_augmentation(images)
        encoded_patches = self.patch_encoder(self.patcher(augmented))
        latent_array = ops.expand_dims(self.latent_array, 0)
        for _ in range(self.num_iterations):
            inputs = {"latent_array": latent_array, "data_array": encoded_patches}
            latent_array = self.transformer(self.cross_attention(inputs))
        return self.classification_head(self.global_average_pooling(latent_array))


def published() -> keras.Model:
    """The model with the sizes and the pixel statistics of the example."""
    augmentation = create_data_augmentation([129.3, 124.1, 112.4], [4646.9, 4277.2, 4959.0], 64)
    augmentation.build((None, 32, 32, 3))  # built within the step, its constants would belong to the graph of the step
    return PublishedPerceiver(
        patch_size=2,
        data_dim=1024,
        latent_dim=256,
        projection_dim=256,
        num_heads=8,
        num_transformer_blocks=4,
        ffn_units=[256, 256],
        dropout_rate=0.2,
        num_iterations=2,
        classifier_units=[256, 100],
        data_augmentation=augmentation,
    )
