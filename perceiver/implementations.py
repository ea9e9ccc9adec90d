"""Which backward passes are used on which device: those written out in this package, or the library's. One table.

    own          the formulas and backward passes of this package
    automatic    the same formulas, differentiated automatically; with XLA it fuses them
    library      Keras's own: `ops.dot_product_attention`, which is a flash attention where the backend has one,
                 `layers.LayerNormalization`, `ops.gelu`

`python benchmarks/gpu.py` measures them on the device that is there. On CPUs the own ones are faster, and on an H100
without XLA; with XLA, the others have not been measured there (docs/results.md).

The convolutions of the stem are Keras's. In mixed precision they can be computed in float32 in training, from the same
rounded numbers and with results that are rounded the same way. oneDNN has no kernels for their gradients in 16 bits on
processors without AVX-512, where a step of `cifar100` in bfloat16 takes a seventh of the time this way.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import keras

from perceiver.processor import has_bfloat16_kernels


@dataclass(frozen=True)
class Implementations:
    """What computes each part of a block."""

    attention: Literal["own", "automatic", "library"] = "own"
    """Attention without mask, dropout, chunks and returned weights."""
    layer_norm: Literal["own", "library"] = "own"
    gelu: Literal["own", "library"] = "own"
    convolution: Literal["library", "float32"] = "library"
    """Of the stem, in training."""


CHOICES = {
    ("tensorflow", "cpu"): Implementations(),  # measured
    ("tensorflow", "gpu"): Implementations(),  # measured without XLA
    ("jax", "cpu"): Implementations(),  # not measured
    ("jax", "gpu"): Implementations(),  # not measured
}
"""By backend of Keras and kind of device; others are as CPUs of TensorFlow."""

_instead: list[Implementations] = []


def implementations() -> Implementations:
    """What the next layers to be traced use."""
    if _instead:
        return _instead[-1]
    device = _device()
    chosen = chosen_for(keras.backend.backend(), device)
    return replace(chosen, convolution="float32") if device == "cpu" and not has_bfloat16_kernels() else chosen


def chosen_for(backend: str, device: str) -> Implementations:
    return CHOICES.get((backend, device), Implementations())


@contextlib.contextmanager
def using(other: Implementations) -> Iterator[None]:
    """Within this context layers use `other`. What was traced before, such as a compiled step, keeps what it has."""
    _instead.append(other)
    try:
        yield
    finally:
        _instead.pop()


def _device() -> str:
    """Kind of the device on which Keras computes: "cpu", "gpu" or "tpu"."""
    return keras.distribution.list_devices()[0].partition(":")[0]
