"""Multi-head attention whose keys and values can be computed separately.

A cross-attend that several iterations share thus computes them once per image rather than once per iteration.
`keras.layers.MultiHeadAttention` cannot do that. Shapes: B images, N latents, M inputs, H heads, D the width of a
latent, C the width of a row of the data array.
"""

import math
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import layers, ops

from perceiver.chunked_attention import attention_logits, attention_weights, chunked_attention
from perceiver.dot_product_attention import attention_of
from perceiver.freezing import LayerWithParts
from perceiver.implementations import implementations
from perceiver.spatial_prior import SpatialPrior

Shape = tuple[Any, ...]  # integers, None where a size is unknown


@keras.saving.register_keras_serializable(package="perceiver")
class MultiHeadAttention(LayerWithParts):
    """softmax(s Q K^T) V for each head, then a linear layer on the concatenated heads.

    The factor s is 1/sqrt(qk_dim / H) or a learned scalar; it is applied to Q, the smallest of the three. With a mask,
    dropout, chunks or returned weights, the softmax is computed in float32 whatever the compute dtype.

    Args:
        num_heads: Number of heads H.
        qk_dim: Width of queries and keys, all heads together.
        v_dim: Width of the values, all heads together.
        output_dim: Width of the output projection; None: no projection, so that the result is `v_dim` wide.
        scale: "inverse_sqrt" or "learned".
        dropout: Dropout rate on the attention weights.
        chunk_size: Number of keys processed at once, in an online softmax; None: all of them.
        grid: Rows and columns of the grid that the data flattens, for a `SpatialPrior` of the N rows; None: no prior.
        seed: Seed of the dropout masks; None: a random one.

    Raises:
        ValueError: if the heads do not divide the widths, for dropout together with chunks, which never hold the
            weights, and if a mask is not as wide as the data has rows.

    Call: rows (B or 1, N, D) and data (B, M, C) -> (B, N, output_dim). With `keys_values`, which the method of that
    name returns, data may be None. `attention_mask` is boolean, (B, M) or (B, N, M), true where a row may attend; a
    row that may attend nowhere gets zeros. With `return_weights`, the result is a pair whose second part is the
    attention weights (B, H, N, M).

    Example:
        >>> attention = MultiHeadAttention(num_heads=2, qk_dim=8, v_dim=8, output_dim=4)
        >>> attention(np.ones((1, 3, 4)), np.ones((5, 7, 6))).shape
        (5, 3, 4)
    """

    def __init__(
        self,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        output_dim: int | None,
        scale: str = "inverse_sqrt",
        dropout: float = 0.0,
        chunk_size: int | None = None,
        grid: tuple[int, int] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if qk_dim % num_heads or v_dim % num_heads:
            raise ValueError(f"qk_dim = {qk_dim} and v_dim = {v_dim}: give multiples of num_heads = {num_heads}")
        if dropout and chunk_size is not None:
            raise ValueError(
                f"dropout = {dropout}: set it to 0, since chunk_size = {chunk_size} never holds the weights"
            )
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.v_dim = v_dim
        self.output_dim = output_dim
        self.scale = scale
        self.dropout = dropout
        self.chunk_size = chunk_size
        self.grid = None if grid is None else (grid[0], grid[1])
        self.seed = seed

    def build(self, rows_shape: Shape, data_shape: Shape) -> None:
        self.query = layers.Dense(self.qk_dim, name="query", dtype=self.dtype_policy)
        self.query.build(rows_shape)
        self.key = layers.Dense(self.qk_dim, name="key", dtype=self.dtype_policy)
        self.key.build(data_shape)
        self.value = layers.Dense(self.v_dim, name="value", dtype=self.dtype_policy)
        self.value.build(data_shape)
        if self.output_dim is not None:
            self.output_projection = layers.Dense(self.output_dim, name="output_projection", dtype=self.dtype_policy)
            self.output_projection.build((*rows_shape[:-1], self.v_dim))
        if self.scale == "learned":
            self.factor = self.add_weight(shape=(), initializer="ones", name="factor")
        self.prior = None
        if self.grid is not None:
            self.prior = SpatialPrior(self.grid, self.num_heads, rows_shape[-2], name="prior", dtype=self.dtype_policy)
            self.prior.build((None, self.num_heads, rows_shape[-2], self.qk_dim // self.num_heads))
        self.weights_dropout = layers.Dropout(self.dropout, seed=self.seed, dtype=self.dtype_policy)
        self.freeze()

    def keys_values(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> keys (B, H, M, qk_dim / H), with a prior 4 or 9 wider, and values (B, H, M, v_dim / H)."""
        keys, values = _split_heads(self.key(data), self.num_heads), _split_heads(self.value(data), self.num_heads)
        return keys if self.prior is None else self.prior.extend_keys(keys), values

    def call(
        self,
        rows: Tensor,
        data: Tensor | None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_weights: bool = False,
    ) -> Any:
        keys, values = self.keys_values(data) if keys_values is None else keys_values
        factor = self.factor if self.scale == "learned" else 1 / math.sqrt(self.qk_dim // self.num_heads)
        queries = _split_heads(self.query(rows) * factor, self.num_heads)
        if self.prior is not None:
            queries = self.prior(queries)
        # Not left to the matmul: TensorFlow 2.21 with oneDNN corrupts memory when it broadcasts a batch of one.
        queries = ops.broadcast_to(queries, (ops.shape(keys)[0], *queries.shape[1:]))
        mask = attention_mask
        if mask is not None:  # (B, 1, 1 or N, M)
            sizes = {mask.shape[-1], keys.shape[2]} - {None}  # chunks would cut a longer one
            if len(sizes) > 1:
                raise ValueError(f"the attention mask is {tuple(mask.shape)}: give one of {keys.shape[2]} columns")
            mask = mask[:, None, None, :] if len(mask.shape) == 2 else mask[:, None]
        weights = None
        if self.chunk_size is not None and not return_weights:
            outputs = chunked_attention(queries, keys, values, mask, self.chunk_size)
        elif mask is None and not return_weights and not (training and self.dropout):
            outputs = attention_of(implementations().attention)(queries, keys, values)
        else:
            weights = attention_weights(attention_logits(queries, keys, mask), mask)
            weights = ops.cast(weights, self.compute_dtype)
            outputs = ops.matmul(self.weights_dropout(weights, training=training), values)
        outputs = _merge_heads(outputs)
        if self.output_dim is not None:
            outputs = self.output_projection(outputs)
        return (outputs, weights) if return_weights else outputs

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "qk_dim": self.qk_dim,
            "v_dim": self.v_dim,
            "output_dim": self.output_dim,
            "scale": self.scale,
            "dropout": self.dropout,
            "chunk_size": self.chunk_size,
            "grid": self.grid,
            "seed": self.seed,
        }


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)"""
    rows, width = x.shape[1:]
    if num_heads == 1:
        return ops.expand_dims(x, 1)
    return ops.transpose(ops.reshape(x, (-1, rows, num_heads, width // num_heads)), (0, 2, 1, 3))


def _merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)"""
    heads, rows, width = x.shape[1:]
    if heads == 1:
        return ops.squeeze(x, 1)
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, rows, heads * width))
