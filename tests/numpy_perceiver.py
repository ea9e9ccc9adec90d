"""A Perceiver in plain NumPy and float64, from the papers' equations. The tests compare the Keras model with it.

It shares no code with `perceiver`; weights come as a dict from the path of a Keras variable to its values.
"""

import math
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def layer_norm(weights: Weights, name: str, x: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * weights[f"{name}/gamma"] + weights[f"{name}/beta"]


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def attention(
    weights: Weights, name: str, rows: np.ndarray, data: np.ndarray, num_heads: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output (N, D) and weights (H, N, M) of one image's attention; mask (N, M)."""
    q, k, v = (linear(weights, f"{name}/{part}", x) for part, x in (("query", rows), ("key", data), ("value", data)))
    outputs, maps = [], []
    for q_h, k_h, v_h in zip(*(np.split(x, num_heads, axis=-1) for x in (q, k, v)), strict=True):
        logits = q_h @ k_h.T / np.sqrt(q_h.shape[-1])
        maps.append(softmax(logits if mask is None else np.where(mask, logits, -1e9)))
        outputs.append(maps[-1] @ v_h)
    return linear(weights, f"{name}/output_projection", np.concatenate(outputs, axis=-1)), np.stack(maps)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def mlp(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    hidden = linear(weights, f"{name}/hidden", x)
    return linear(weights, f"{name}/output_projection", hidden * (1 + _erf(hidden / math.sqrt(2))) / 2)


def cross_attend(
    weights: Weights, name: str, latents: np.ndarray, data: np.ndarray, num_heads: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Latents (N, D) after one cross-attend to the data array (M, C), and the attention weights (H, N, M)."""
    rows, data = layer_norm(weights, f"{name}/latents_norm", latents), layer_norm(weights, f"{name}/data_norm", data)
    outputs, maps = attention(weights, f"{name}/attention", rows, data, num_heads, mask)
    x = latents + outputs
    return x + mlp(weights, f"{name}/mlp", layer_norm(weights, f"{name}/mlp_norm", x)), maps


def self_attend(weights: Weights, name: str, latents: np.ndarray, num_heads: int) -> np.ndarray:
    """Latents (N, D) after one self-attend."""
    rows = layer_norm(weights, f"{name}/norm", latents)
    x = latents + attention(weights, f"{name}/attention", rows, rows, num_heads)[0]
    return x + mlp(weights, f"{name}/mlp", layer_norm(weights, f"{name}/mlp_norm", x))


_erf = np.vectorize(math.erf)
