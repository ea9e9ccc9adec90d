"""Forward and backward pass of attention, LayerNorm and GELU in each implementation; for `benchmarks/gpu.py`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from perceiver.dot_product_attention import attention_of
from perceiver.gelu import gelu
from perceiver.implementations import Implementations, using
from perceiver.normalization import LayerNorm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Speed of one implementation of a part.

    Attributes:
        part: Name and shape.
        implementation: As in `perceiver.implementations`; with ", XLA" if it was compiled.
        milliseconds: Median of a forward and a backward pass.
        difference: Largest absolute difference of output and gradients from those of the own one, relative to the
            largest absolute value.
    """

    part: str
    implementation: str
    milliseconds: float
    difference: float


def measure_parts(dtype: str, smoke: bool, calls: int) -> list[Part]:
    """All parts at the shapes of cifar100_gpu's and paper_imagenet's blocks, or at small ones."""
    if smoke:
        attentions, rows = {"4 of 8": ((2, 2, 4, 8), (2, 2, 8, 8))}, {"8 x 16": (2, 4, 16)}
    else:
        attentions = {
            "32 of 64 inputs, 8 heads": ((512, 8, 32, 48), (512, 8, 64, 48)),
            "32 of 32 latents, 8 heads": ((512, 8, 32, 48), (512, 8, 32, 48)),
            "512 of 50,176 inputs": ((2, 1, 512, 261), (2, 1, 50176, 261)),
            "512 of 512 latents, 8 heads": ((16, 8, 512, 128), (16, 8, 512, 128)),
        }
        rows = {"16,384 x 384": (512, 32, 384), "8,192 x 1,024": (16, 512, 1024)}
    found: list[Part] = []
    for name, (queries, keys) in attentions.items():
        inputs = [_normal(shape, dtype) for shape in (queries, keys, keys)]
        ways = {way: attention_of(way) for way in ("own", "automatic", "library")}
        found += _compare(f"attention, {name}", ways, inputs, calls, smoke)
    for name, shape in rows.items():
        inputs = [_normal(shape, dtype)]
        norm = LayerNorm(dtype="float32" if dtype == "float32" else f"mixed_{dtype}")
        norm.build(shape)
        plain = Implementations(layer_norm="library", gelu="library")
        found += _compare(f"LayerNorm, {name}", {"own": norm, "library": _with(plain, norm)}, inputs, calls, smoke)
        found += _compare(f"GELU, {name}", {"own": gelu, "library": _with(plain, gelu)}, inputs, calls, smoke)
    return found


def _with(implementations: Implementations, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: tf.Tensor) -> Any:
        with using(implementations):
            return function(*inputs)

    return call


def _normal(shape: Shape, dtype: str) -> tf.Tensor:
    return tf.cast(tf.random.stateless_normal(shape, seed=(len(shape), shape[-2])) / shape[-1] ** 0.25, dtype)


def _compare(
    part: str, ways: dict[str, Callable[..., Any]], inputs: list[tf.Tensor], calls: int, smoke: bool
) -> list[Part]:
    found, expected = [], None
    for name, function in ways.items():
        for xla in (False,) if smoke and name != "library" else (False, True):
            both = _compiled(function, xla)
            results = [np.asarray(tf.cast(x, "float32")) for x in both(*inputs)]
            expected = results if expected is None else expected
            pairs = zip(results, expected, strict=True)
            difference = max(float(np.abs(mine - other).max() / np.abs(other).max()) for mine, other in pairs)
            seconds = []
            for _ in range(calls):
                start = time.perf_counter()
                both(*inputs)[-1].numpy()
                seconds.append(time.perf_counter() - start)
            label = f"{name}, XLA" if xla else name
            found.append(Part(part, label, 1e3 * statistics.median(seconds), difference))
    return found


def _compiled(function: Callable[..., Any], xla: bool) -> Callable[..., list[tf.Tensor]]:
    return tf.function(lambda *inputs: _both(function, *inputs), autograph=False, jit_compile=xla)


def _both(function: Callable[..., Any], *inputs: tf.Tensor) -> list[tf.Tensor]:
    """Output and gradients of a scalar that depends on all of the output."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs)
        loss = tf.reduce_sum(tf.sin(tf.cast(outputs, "float32")))
    return [outputs, *tape.gradient(loss, inputs)]
