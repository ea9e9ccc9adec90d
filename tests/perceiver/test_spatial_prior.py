"""The learned Gaussians of a cross-attend: their formula, where they start, and what they cost an image to move."""

import math
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from perceiver import Perceiver, presets
from perceiver.attention import MultiHeadAttention
from perceiver.config import prior_width
from perceiver.model import attention_maps
from perceiver.spatial_prior import INITIAL_STD, SPACING, SpatialPrior

GRID, HEADS, LATENTS = (4, 6), 2, 6


def _positions(grid: tuple[int, int]) -> np.ndarray:
    return np.array(
        [[2 * (i + 0.5) / grid[0] - 1, 2 * (j + 0.5) / grid[1] - 1] for i in range(grid[0]) for j in range(grid[1])]
    )


@pytest.mark.parametrize("grid", [GRID, (5, 11)])
def test_the_products_are_log_gaussians_up_to_a_constant_for_each_query(grid: tuple[int, int]) -> None:
    prior = SpatialPrior(grid, HEADS, LATENTS)
    queries = prior(np.zeros((1, HEADS, LATENTS, 1), "float32"))
    keys = prior.extend_keys(ops.zeros((1, HEADS, math.prod(grid), 1)))
    assert queries.shape[-1] == keys.shape[-1] == 1 + prior_width(grid)
    products = ops.convert_to_numpy(ops.matmul(queries, ops.swapaxes(keys, -1, -2)))[0]
    centres = ops.convert_to_numpy(prior.centres)
    precisions = np.exp(ops.convert_to_numpy(prior.log_precisions))
    np.testing.assert_allclose(precisions, 1 / (2 * INITIAL_STD**2), rtol=1e-6)
    distances = (_positions(grid)[None, None] - centres[:, :, None]) ** 2 * precisions[:, :, None]
    expected = -distances.sum(-1)
    expected -= expected.max(-1, keepdims=True)
    np.testing.assert_allclose(products - products.max(-1, keepdims=True), expected, atol=1e-4)


@pytest.mark.parametrize("std", [INITIAL_STD, 0.1, 0.05])
@pytest.mark.parametrize("cells", [8, 14, 28, 56])
def test_narrow_gaussians_are_precise_in_bfloat16(cells: int, std: float) -> None:
    weights = []
    for dtype in ("float32", "mixed_bfloat16"):
        attention = MultiHeadAttention(HEADS, 8, 8, 8, grid=(cells, cells), dtype=dtype)
        attention.build((None, LATENTS, 8), (None, cells**2, 8))
        assert attention.prior is not None
        precisions = attention.prior.log_precisions
        precisions.assign(np.full(precisions.shape, -math.log(2 * std**2), "float32"))
        inputs = (np.zeros((1, size, 8), "float32") for size in (LATENTS, cells**2))
        weights.append(ops.convert_to_numpy(ops.cast(attention(*inputs, return_weights=True)[1], "float32")))
    moved = np.abs(weights[0] - weights[1]).sum(-1) / 2  # the share of the weights that are at other cells
    # 0.32 for a standard deviation of 0.05 and 28 cells without the further columns. On a processor without AVX-512,
    # which rounds more often, 0.04 for 8 cells.
    assert moved.max() < 0.06


def test_latents_start_at_regions_of_their_own_and_heads_beside_one_another() -> None:
    prior = SpatialPrior(GRID, HEADS, LATENTS)
    prior.build((None, HEADS, LATENTS, 1))
    centres = ops.convert_to_numpy(prior.centres)
    np.testing.assert_allclose(centres[1] - centres[0], [[0, SPACING]] * LATENTS, atol=1e-6)
    regions = [(i, j) for i in (-0.5, 0.5) for j in (-2 / 3, 0, 2 / 3)]
    np.testing.assert_allclose(centres.mean(0), regions, atol=1e-6)


def test_a_model_starts_with_local_attention_maps_and_learns_the_prior() -> None:
    model = Perceiver(**asdict(presets.cifar100()))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), "uint8")
    model.build()
    maps = attention_maps(model, images)  # (iterations, B, heads, latents, rows, columns)
    rows = (maps.sum(-1) * (np.arange(8) + 0.5)).sum(-1)
    # Latents 0 to 3 belong to the upper half of the image, 4 to 7 to the lower one.
    assert rows[..., :4].max() < 4 < rows[..., 4:].min()
    gradients = _gradients(model, images)
    assert all(np.abs(gradient).max() > 0 for path, gradient in gradients.items() if "/prior/" in path)
    assert sum("/prior/" in path for path in gradients) == 2 * 2, "two for each cross-attend"


def _gradients(model: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(images) ** 2)
    variables = model.trainable_variables
    return {
        v.path: g.numpy() for v, g in zip(variables, tape.gradient(loss, [v.value for v in variables]), strict=True)
    }


@pytest.mark.parametrize("grid", [GRID, (2, 12)])
@pytest.mark.parametrize("how", ["mask", "chunks", "weights", "bfloat16"])
def test_every_way_through_the_attention_has_the_prior(how: str, grid: tuple[int, int]) -> None:
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(1)
    rows, data = (generator.normal(size=shape).astype("float32") for shape in ((1, LATENTS, 8), (3, 24, 10)))
    arguments: dict[str, Any] = {"num_heads": HEADS, "qk_dim": 8, "v_dim": 8, "output_dim": 8, "grid": grid}
    plain = MultiHeadAttention(**arguments)
    expected = ops.convert_to_numpy(plain(rows, data))
    other = MultiHeadAttention(
        **arguments, chunk_size=7 if how == "chunks" else None, dtype="mixed_bfloat16" if how == "bfloat16" else None
    )
    other.build(rows.shape, data.shape)
    other.set_weights(plain.get_weights())
    mask = np.ones((3, 24), bool) if how == "mask" else None
    outputs = other(rows, data, attention_mask=mask, return_weights=how == "weights")
    outputs = ops.convert_to_numpy(ops.cast(outputs[0] if how == "weights" else outputs, "float32"))
    np.testing.assert_allclose(outputs, expected, atol=0.05 if how == "bfloat16" else 1e-5)
    without = MultiHeadAttention(**{**arguments, "grid": None})
    without.build(rows.shape, data.shape)
    without.set_weights([v for v, w in zip(plain.get_weights(), plain.weights, strict=True) if "prior" not in w.path])
    assert np.abs(ops.convert_to_numpy(without(rows, data)) - expected).max() > 0.1
