"""The Perceiver (Jaegle et al., arXiv:2103.03206): uint8 images to logits by latents that attend to them repeatedly."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import layers, ops

from perceiver.blocks import MLP, CrossAttentionBlock, SelfAttentionBlock
from perceiver.config import PerceiverConfig
from perceiver.freezing import freeze_parts, frozen_config
from perceiver.gelu import gelu
from perceiver.normalization import LayerNorm
from perceiver.position_encoding import FourierPositionEncoding, LearnedPositionEncoding
from perceiver.preprocessing import ConvStem, ImageNormalization, PatchStem

Shape = tuple[Any, ...]  # integers, None where a size is unknown


@keras.saving.register_keras_serializable(package="perceiver")
class Perceiver(keras.Model):
    """Image classifier with the shape of a `PerceiverConfig`, whose fields are its arguments.

    Args:
        name, dtype, trainable: As in every Keras model; `dtype="mixed_bfloat16"` computes in bfloat16.
        frozen: Paths of layers and weights whose `trainable` is false once the model is built. A model that is saved
            lists here what was frozen in it, so that it is frozen in the loaded one too.
        **fields: Fields of `PerceiverConfig`.

    Call: uint8 images (B, H, W, channels), values 0..255 -> float32 logits (B, classes). The optional
    `attention_mask`, boolean (B, M) or (B, N, M), is true where latents may attend to the data array, whose M rows are
    the cells of `config.grid` in row-major order.

    Raises:
        ValueError: if the fields contradict each other, or the images do not have `image_shape`.

    Example:
        >>> model = Perceiver(**asdict(PerceiverConfig(image_shape=(8, 8, 1), num_classes=10)))
        >>> model(np.zeros((2, 8, 8, 1), "uint8")).shape
        (2, 10)
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        frozen: Sequence[str] = (),
        **fields: Any,
    ) -> None:
        # No autocast: the first layer gets the uint8 images and casts them to float32 whatever the compute dtype.
        super().__init__(name=name, dtype=dtype, trainable=trainable, autocast=False)
        self.config = PerceiverConfig(**fields)
        self._frozen = tuple(frozen)

    def build(self, input_shape: Shape | None = None) -> None:
        config = self.config
        if input_shape is not None:
            self._check_image_shape(input_shape)
        # One seed for each block, which has three dropouts.
        seeds = itertools.repeat(None) if config.seed is None else itertools.count(config.seed, 3)
        self._build_input()
        self._build_encoder(seeds)
        self._build_head(seeds)
        freeze_parts(self, self._frozen)

    def _build_input(self) -> None:
        config, dtype = self.config, self.dtype_policy
        size = config.resized_shape
        self.normalization = ImageNormalization(
            config.pixel_mean, config.pixel_std, size, name="normalization", dtype=dtype
        )
        self.normalization.build((None, *config.image_shape))
        if config.stem == "conv":
            self.stem = ConvStem(
                config.num_conv_layers,
                config.conv_channels,
                config.data_dim,
                config.conv_pool_size,
                config.conv_channel_growth,
                config.num_conv_residuals,
                name="stem",
                dtype=dtype,
            )
        else:
            patch_size = config.patch_size if config.stem == "patches" else 1
            self.stem = PatchStem(patch_size, config.data_dim, config.patch_whitening, name="stem", dtype=dtype)
        self.stem.build((None, *size, config.image_shape[2]))
        self.positions = None
        if config.position_encoding == "fourier":
            self.positions = FourierPositionEncoding(
                config.grid,
                config.num_fourier_bands,
                config.fourier_max_resolution,
                config.include_positions,
                config.position_combination,
                name="positions",
                dtype=dtype,
            )
        elif config.position_encoding == "learned":
            self.positions = LearnedPositionEncoding(
                config.num_inputs,
                config.position_dim,
                config.position_combination,
                config.init_std,
                name="positions",
                dtype=dtype,
            )
        if self.positions is not None:
            self.positions.build((None, config.num_inputs, config.projected_dim))
        self.input_mlp = None
        if config.input_mlp_widening_factor:
            data_shape = (None, config.num_inputs, config.data_width)
            self.input_norm = LayerNorm(epsilon=config.layer_norm_epsilon, name="input_norm", dtype=dtype)
            self.input_norm.build(data_shape)
            self.input_mlp = MLP(
                config.input_mlp_widening_factor, config.approximate_gelu, name="input_mlp", dtype=dtype
            )
            self.input_mlp.build(data_shape)

    def _build_encoder(self, seeds: Iterator[int | None]) -> None:
        config = self.config
        self.latents = self._add_vectors(config.num_latents, "latents")
        latents_shape = (None, config.num_latents, config.latent_dim)
        self.cross_attends = []
        for i in range(max(config.cross_attend_order) + 1):
            block = CrossAttentionBlock(
                config.num_cross_attention_heads,
                config.cross_qk_dim,
                config.cross_v_dim,
                config.cross_attention_widening_factor,
                scale=config.cross_attention_scale,
                residual=config.residual,
                use_output_projection=config.cross_attention_output_projection,
                chunk_size=config.attention_chunk_size,
                grid=config.grid if config.cross_attention_prior else None,
                seed=next(seeds),
                name=f"cross_attend_{i}",
                **self._block_arguments(),
            )
            block.build(latents_shape, (None, config.num_inputs, config.data_width))
            self.cross_attends.append(block)
        self.latent_transformers = []
        for i in range(max(config.latent_transformer_order) + 1):
            transformer = [
                SelfAttentionBlock(
                    config.num_self_attention_heads,
                    config.self_qk_dim,
                    config.self_v_dim,
                    config.self_attention_widening_factor,
                    seed=next(seeds),
                    name=f"self_attend_{i}_{j}",
                    **self._block_arguments(),
                )
                for j in range(config.num_self_attention_blocks)
            ]
            for block in transformer:
                block.build(latents_shape)
            self.latent_transformers.append(transformer)

    def _build_head(self, seeds: Iterator[int | None]) -> None:
        config = self.config
        latents_shape = (None, config.num_latents, config.latent_dim)
        self.final_norm = None
        if config.use_final_layer_norm:
            self.final_norm = LayerNorm(epsilon=config.layer_norm_epsilon, name="final_norm", dtype=self.dtype_policy)
            self.final_norm.build(latents_shape)
        if config.head == "query":
            self.output_query = self._add_vectors(1, "output_query")
            self.decoder = CrossAttentionBlock(
                config.num_cross_attention_heads,
                widening_factor=config.cross_attention_widening_factor,
                seed=next(seeds),
                name="decoder",
                **self._block_arguments(),
            )
            self.decoder.build((None, 1, config.latent_dim), latents_shape)
        # The rest is float32 under every policy: it is little work, and the loss needs precise logits.
        self.head_hidden = None
        if config.head_hidden_dim is not None:
            self.head_hidden = layers.Dense(config.head_hidden_dim, name="head_hidden", dtype="float32")
            self.head_hidden.build((None, config.latent_dim))
        initializer = "zeros" if config.zero_init_logits else "glorot_uniform"
        self.logits = layers.Dense(config.num_classes, kernel_initializer=initializer, name="logits", dtype="float32")
        self.logits.build((None, config.head_hidden_dim or config.latent_dim))
        self.logits_dropout = layers.Dropout(config.logits_dropout, seed=next(seeds), dtype="float32")

    def _add_vectors(self, count: int, name: str) -> keras.Variable:
        initializer = keras.initializers.TruncatedNormal(stddev=self.config.init_std)
        return self.add_weight(shape=(count, self.config.latent_dim), initializer=initializer, name=name)

    def _block_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "dropout_after_attention": config.dropout_after_attention,
            "approximate_gelu": config.approximate_gelu,
            "epsilon": config.layer_norm_epsilon,
            "remat": config.remat,
            "dtype": self.dtype_policy,
        }

    def call(self, images: Tensor, attention_mask: Tensor | None = None, training: bool | None = None) -> Tensor:
        latents, _ = self.encode(self.data_array(images), attention_mask, training)
        return self.decode(latents, training)

    def data_array(self, images: Tensor) -> Tensor:
        """Images (B, H, W, channels) -> data array (B, M, C).

        Raises:
            ValueError: if the images do not have `image_shape`.
        """
        self._check_image_shape(images.shape)  # a model that was loaded is built before it gets images
        rows = self.stem(self.normalization(images))
        rows = rows if self.positions is None else self.positions(rows)
        return rows if self.input_mlp is None else rows + self.input_mlp(self.input_norm(rows))

    def _check_image_shape(self, shape: Shape) -> None:
        """Other images would be broadcast, cut or given the positions of other cells without an error."""
        if tuple(shape[1:]) != self.config.image_shape:
            raise ValueError(
                f"the images are {tuple(shape[1:])}, model.image_shape is {self.config.image_shape}: make them equal"
            )

    def encode(
        self,
        data: Tensor,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Data array (B, M, C) -> latents (B, N, D), and with `return_weights` the weights of each cross-attend."""
        config = self.config
        # Computed once per image, however many iterations share them.
        keys_values = [block.keys_values(data) for block in self.cross_attends]
        # The first queries are the same for all images: a batch of one.
        latents = ops.expand_dims(ops.cast(self.latents, self.compute_dtype), 0)
        maps = []
        for cross, transformer in zip(config.cross_attend_order, config.latent_transformer_order, strict=True):
            latents = self.cross_attends[cross](
                latents,
                None,
                keys_values[cross],
                attention_mask=attention_mask,
                training=training,
                return_weights=return_weights,
            )
            if return_weights:
                latents, weights = latents
                maps.append(weights)
            for block in self.latent_transformers[transformer] * config.num_self_attention_repeats:
                latents = block(latents, training=training)
        return latents if self.final_norm is None else self.final_norm(latents), maps

    def decode(self, latents: Tensor, training: bool | None = None) -> Tensor:
        """Latents (B, N, D) -> float32 logits (B, classes)."""
        if self.config.head == "query":
            query = ops.expand_dims(ops.cast(self.output_query, self.compute_dtype), 0)
            x = ops.squeeze(self.decoder(query, latents, training=training), 1)
        else:
            x = ops.mean(ops.cast(latents, "float32"), axis=1)
        if self.head_hidden is not None:
            x = gelu(self.head_hidden(x), self.config.approximate_gelu)
        return self.logits_dropout(self.logits(x), training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape[0], self.config.num_classes

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **asdict(self.config), **frozen_config(self, self._frozen)}


def attention_maps(model: Perceiver, images: Tensor) -> np.ndarray:
    """The attention weights of every cross-attend, arranged as maps over the image.

    Args:
        model: A built Perceiver.
        images: (B, H, W, channels), as for the model.

    Returns:
        float32 array of shape (iterations, B, heads, latents, rows, columns); each map sums to 1.
    """
    _, maps = model.encode(model.data_array(images), return_weights=True)
    config = model.config
    shape = (config.num_iterations, -1, config.num_cross_attention_heads, config.num_latents, *config.grid)
    return ops.convert_to_numpy(ops.reshape(ops.cast(ops.stack(maps), "float32"), shape))
