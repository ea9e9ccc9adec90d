"""A Perceiver of equal size in PyTorch; for `benchmarks/gpu.py` and `benchmarks/model_step.py --peers`.

It has the shapes, the sharing and the operations of `perceiver.Perceiver`: the same stem, pre-LayerNorm blocks,
attention of `torch.nn.functional`, Gaussians over the grid and GELU; so it has as many parameters. Fixed positions are
zeros. Imports no TensorFlow, since it also runs in environments that have none.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as functional
from torch import nn

from perceiver import PerceiverConfig
from perceiver.cost import parameter_count


class SpatialPrior(nn.Module):
    """Four further entries of queries and keys, whose product is the logarithm of a Gaussian over the grid."""

    def __init__(self, grid: tuple[int, int], heads: int, queries: int) -> None:
        super().__init__()
        axes = [(2 * torch.arange(cells) + 1) / cells - 1 for cells in grid]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        self.keys: torch.Tensor
        self.register_buffer("keys", torch.cat([positions, positions**2], dim=-1))
        self.centres = nn.Parameter(torch.zeros(heads, queries, 2))
        self.log_precisions = nn.Parameter(torch.full((heads, queries, 2), math.log(8.0)))

    def queries(self) -> torch.Tensor:
        precisions = self.log_precisions.exp()
        return torch.cat([2 * precisions * self.centres, -precisions], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of rows (B, N, D) over data (B, M, C)."""

    def __init__(self, heads: int, rows: int, data: int, qk: int, v: int, prior: SpatialPrior | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, (qk // heads) ** -0.5
        self.query, self.key, self.value = nn.Linear(rows, qk), nn.Linear(data, qk), nn.Linear(data, v)
        self.output = nn.Linear(v, rows)
        self.prior = prior

    def keys_values(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._split(self.key(data)), self._split(self.value(data))
        return (keys if self.prior is None else _joined(keys, self.prior.keys)), values

    def forward(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        queries = self._split(self.query(rows))
        if self.prior is not None:  # the Gaussians are not scaled
            queries = _joined(queries * self.scale, self.prior.queries())
        scale = self.scale if self.prior is None else 1.0
        x = functional.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return self.output(x.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _joined(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, H, n, d) and (..., n, f), of all heads or of each -> (B, H, n, d + f)"""
    return torch.cat([x, features.to(x.dtype).expand(*x.shape[:3], -1)], dim=-1)


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and beside a skip connection."""

    def __init__(self, config: PerceiverConfig, is_cross: bool) -> None:
        super().__init__()
        width = config.latent_dim
        data = config.data_width if is_cross else width
        heads = config.num_cross_attention_heads if is_cross else config.num_self_attention_heads
        qk, v = (config.cross_qk_dim, config.cross_v_dim) if is_cross else (config.self_qk_dim, config.self_v_dim)
        factor = config.cross_attention_widening_factor if is_cross else config.self_attention_widening_factor
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.data_norm = nn.LayerNorm(data) if is_cross else nn.Identity()
        prior = (
            SpatialPrior(config.grid, heads, config.num_latents) if is_cross and config.cross_attention_prior else None
        )
        self.attention = Attention(heads, width, data, qk, v, prior)
        self.mlp = nn.Sequential(nn.Linear(width, factor * width), nn.GELU(), nn.Linear(factor * width, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        rows = self.norm(x)
        keys, values = self.attention.keys_values(rows) if keys_values is None else keys_values
        x = x + self.dropout(self.attention(rows, keys, values))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class TorchPerceiver(nn.Module):
    """uint8 images (B, H, W, channels) to logits (B, K).

    Raises:
        ValueError: if the config has a setting that adds parameters to the Perceiver and is unknown here.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.conv_widths if config.stem == "conv" else ()
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.residuals = nn.ModuleList(
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1) for _ in range(config.num_conv_residuals)
        )
        used = widths[-1] if widths else config.image_shape[2]
        # What the stem gives is padded to the width of the data array, where the preset concatenates positions.
        self.padding = config.data_width - used
        positions = torch.zeros(config.num_inputs, config.data_width)
        self.positions = nn.Parameter(positions, requires_grad=config.position_encoding == "learned")
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.latent_dim) * 0.02)
        self.cross = nn.ModuleList(Block(config, True) for _ in set(config.cross_attend_order))
        self.towers = nn.ModuleList(
            nn.ModuleList(Block(config, False) for _ in range(config.num_self_attention_blocks))
            for _ in set(config.latent_transformer_order)
        )
        self.final_norm = nn.LayerNorm(config.latent_dim) if config.use_final_layer_norm else nn.Identity()
        self.logits = nn.Linear(config.latent_dim, config.num_classes)
        parameters = sum(each.numel() for each in self.parameters() if each.requires_grad)
        if parameters != (expected := parameter_count(config)):
            raise ValueError(f"{parameters:,} parameters in PyTorch, {expected:,} in the Perceiver: {config}")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.permute(0, 3, 1, 2).float() - 127.0) / 64.0
        for convolution in self.stem:
            size = self.config.conv_pool_size
            x = functional.relu(functional.max_pool2d(convolution(x), size, stride=2, padding=(size - 1) // 2))
        for convolution in self.residuals:
            x = x + functional.relu(convolution(x))
        data = functional.pad(x.flatten(2).transpose(1, 2), (0, self.padding)) + self.positions
        # Keys and values of a cross-attend that several iterations share are computed once.
        shared = {i: block.attention.keys_values(block.data_norm(data)) for i, block in enumerate(self.cross)}
        x = self.latents.expand(len(images), -1, -1)
        order = zip(self.config.cross_attend_order, self.config.latent_transformer_order, strict=True)
        for cross, tower in order:
            x = self.cross[cross](x, shared[cross])
            for block in self.towers[tower]:
                x = block(x)
        return self.logits(self.final_norm(x).mean(1).float())
