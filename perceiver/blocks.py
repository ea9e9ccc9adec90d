"""The blocks of a Perceiver: pre-LayerNorm cross-attention and self-attention, each followed by an MLP."""

from collections.abc import Callable
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import layers

from perceiver.attention import MultiHeadAttention
from perceiver.freezing import LayerWithParts
from perceiver.gelu import gelu
from perceiver.normalization import LayerNorm

Shape = tuple[Any, ...]  # integers, None where a size is unknown


@keras.saving.register_keras_serializable(package="perceiver")
class MLP(LayerWithParts):
    """A GELU layer, then a linear layer back to the width of the input.

    Args:
        widening_factor: Hidden width in multiples of the width of the input.
        approximate_gelu: Whether GELU is the tanh approximation.

    Call: (B, N, D) -> (B, N, D).
    """

    def __init__(self, widening_factor: int = 1, approximate_gelu: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widening_factor = widening_factor
        self.approximate_gelu = approximate_gelu

    def build(self, input_shape: Shape) -> None:
        width = input_shape[-1]
        self.hidden = layers.Dense(self.widening_factor * width, name="hidden", dtype=self.dtype_policy)
        self.hidden.build(input_shape)
        self.output_projection = layers.Dense(width, name="output_projection", dtype=self.dtype_policy)
        self.output_projection.build((*input_shape[:-1], self.widening_factor * width))
        self.freeze()

    def call(self, inputs: Tensor) -> Tensor:
        return self.output_projection(gelu(self.hidden(inputs), self.approximate_gelu))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "widening_factor": self.widening_factor,
            "approximate_gelu": self.approximate_gelu,
        }


class _Block(LayerWithParts):
    """The common part of both blocks: arguments, attention, dropouts and MLP."""

    def __init__(
        self,
        num_heads: int = 1,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        widening_factor: int = 1,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        dropout_after_attention: bool = True,
        approximate_gelu: bool = False,
        epsilon: float = 1e-5,
        remat: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if attention_dropout and remat:
            raise ValueError(
                f"attention_dropout = {attention_dropout}: set it to 0, since remat computes the attention again, with "
                "another mask"
            )
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.v_dim = v_dim
        self.widening_factor = widening_factor
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.dropout_after_attention = dropout_after_attention
        self.approximate_gelu = approximate_gelu
        self.epsilon = epsilon
        self.remat = remat
        self.seed = seed

    def _build(self, latents_shape: Shape, data_shape: Shape, output_dim: int | None, **attention: Any) -> None:
        seeds = [None] * 3 if self.seed is None else [self.seed + i for i in range(3)]
        qk_dim = self.qk_dim or data_shape[-1]
        self.attention = MultiHeadAttention(
            self.num_heads,
            qk_dim,
            self.v_dim or qk_dim,
            output_dim,
            dropout=self.attention_dropout,
            seed=seeds[0],
            name="attention",
            dtype=self.dtype_policy,
            **attention,
        )
        self.attention.build(latents_shape, data_shape)
        rate = self.dropout if self.dropout_after_attention else 0.0
        self.attention_output_dropout = layers.Dropout(rate, seed=seeds[1], dtype=self.dtype_policy)
        self.mlp_norm = self._norm(latents_shape, "mlp_norm")
        self.mlp = MLP(self.widening_factor, self.approximate_gelu, name="mlp", dtype=self.dtype_policy)
        self.mlp.build(latents_shape)
        self.mlp_dropout = layers.Dropout(self.dropout, seed=seeds[2], dtype=self.dtype_policy)
        self.freeze()

    def _norm(self, input_shape: Shape, name: str) -> LayerNorm:
        norm = LayerNorm(epsilon=self.epsilon, name=name, dtype=self.dtype_policy)
        norm.build(input_shape)
        return norm

    def _rematerialised(self, function: Callable) -> Callable:
        """Wraps a function so that it is recomputed in the backward pass, if `remat` is set.

        `keras.RematScope` fails in TensorFlow's graph mode on a layer that is called with keywords. The dropouts on the
        outputs are not wrapped, since they would draw another mask.
        """
        # A new lambda for each call: JAX caches the trace of a function together with the weights of that time, and the
        # current weights would get no gradient.
        return keras.remat(lambda *inputs: function(*inputs)) if self.remat else function

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "qk_dim": self.qk_dim,
            "v_dim": self.v_dim,
            "widening_factor": self.widening_factor,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "dropout_after_attention": self.dropout_after_attention,
            "approximate_gelu": self.approximate_gelu,
            "epsilon": self.epsilon,
            "remat": self.remat,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="perceiver")
class SelfAttentionBlock(_Block):
    """Self-attention of the latents, then an MLP; each has a LayerNorm before it and a skip connection around it.

    Args:
        num_heads: Number of heads H.
        qk_dim: Width of queries and keys, all heads together; None: D.
        v_dim: Width of the values, all heads together; None: `qk_dim`.
        widening_factor: Hidden width of the MLP in multiples of D.
        dropout: Dropout rate after the attention and after the MLP.
        attention_dropout: Dropout rate on the attention weights.
        dropout_after_attention: Whether `dropout` applies after the attention too, not only after the MLP.
        approximate_gelu: Whether GELU is the tanh approximation.
        epsilon: Epsilon of every LayerNorm.
        remat: Whether attention and MLP are recomputed in the backward pass; not with `attention_dropout`.
        seed: Seed of the dropout masks; None: a random one.

    Call: (B, N, D) -> (B, N, D); `attention_mask` as in `MultiHeadAttention`.

    Example:
        >>> SelfAttentionBlock(num_heads=2)(np.ones((1, 3, 4))).shape
        (1, 3, 4)
    """

    def build(self, latents_shape: Shape) -> None:
        self.norm = self._norm(latents_shape, "norm")
        self._build(latents_shape, latents_shape, latents_shape[-1])

    def call(self, latents: Tensor, attention_mask: Tensor | None = None, training: bool | None = None) -> Tensor:
        def attend(rows: Tensor) -> Tensor:
            return self.attention(rows, rows, attention_mask=attention_mask, training=training)

        x = self._rematerialised(attend)(self.norm(latents))
        x = latents + self.attention_output_dropout(x, training=training)
        return x + self.mlp_dropout(self._rematerialised(self.mlp)(self.mlp_norm(x)), training=training)

    def compute_output_shape(self, latents_shape: Shape) -> Shape:
        return tuple(latents_shape)


@keras.saving.register_keras_serializable(package="perceiver")
class CrossAttentionBlock(_Block):
    """Cross-attention of latents to a data array, then an MLP; each with LayerNorm and skip connection.

    Args (besides those of `SelfAttentionBlock`; a `qk_dim` of None is C):
        scale: Factor on the logits, "inverse_sqrt" or "learned".
        residual: What the skip connections carry, "input" or (as in the published Keras example) "normalised".
        use_output_projection: Whether the attention ends with a linear layer; if not, `v_dim` has to be D.
        chunk_size: Rows of the data array processed at once; None: all of them.
        grid: Rows and columns of the grid that the data array flattens, for a `SpatialPrior`; None: no prior.

    Call: latents (B or 1, N, D) and data (B, M, C) -> (B, N, D); `keys_values`, `attention_mask` and
    `return_weights` as in `MultiHeadAttention`.

    Example:
        >>> CrossAttentionBlock()(np.ones((1, 3, 4)), np.ones((5, 7, 6))).shape
        (5, 3, 4)
    """

    def __init__(
        self,
        *args: Any,
        scale: str = "inverse_sqrt",
        residual: str = "input",
        use_output_projection: bool = True,
        chunk_size: int | None = None,
        grid: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale
        self.residual = residual
        self.use_output_projection = use_output_projection
        self.chunk_size = chunk_size
        self.grid = None if grid is None else (grid[0], grid[1])

    def build(self, latents_shape: Shape, data_shape: Shape) -> None:
        self.latents_norm = self._norm(latents_shape, "latents_norm")
        self.data_norm = self._norm(data_shape, "data_norm")
        output_dim = latents_shape[-1] if self.use_output_projection else None
        arguments = {"scale": self.scale, "chunk_size": self.chunk_size, "grid": self.grid}
        self._build(latents_shape, data_shape, output_dim, **arguments)

    def keys_values(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a data array (B, M, C), to be shared by several calls."""
        return self.attention.keys_values(self.data_norm(data))

    def call(
        self,
        latents: Tensor,
        data: Tensor | None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_weights: bool = False,
    ) -> Any:
        def attend(rows: Tensor, keys: Tensor, values: Tensor) -> Any:
            return self.attention(
                rows,
                None,
                (keys, values),
                attention_mask=attention_mask,
                training=training,
                return_weights=return_weights,
            )

        keys, values = self.keys_values(data) if keys_values is None else keys_values
        x = self.latents_norm(latents)
        skip = latents if self.residual == "input" else x
        if return_weights:
            x, weights = attend(x, keys, values)
        else:
            x, weights = self._rematerialised(attend)(x, keys, values), None
        x = skip + self.attention_output_dropout(x, training=training)
        y = self.mlp_norm(x)
        skip = x if self.residual == "input" else y
        x = skip + self.mlp_dropout(self._rematerialised(self.mlp)(y), training=training)
        return (x, weights) if return_weights else x

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "scale": self.scale,
            "residual": self.residual,
            "use_output_projection": self.use_output_projection,
            "chunk_size": self.chunk_size,
            "grid": self.grid,
        }
