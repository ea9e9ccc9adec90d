"""Which backward passes are used on which device: those written out in this package, or the library's. One table.

    own          the formulas and backward passes of this package
    automatic    the same formulas, differentiated automatically; with XLA it fuses them
    library      Keras's own: `ops.dot_product_attention`, which is a flash attention where the backend has one,
                 `layers.LayerNormalization`, `ops.gelu`

`python benchmarks/gpu.py` measures them on the device that is there. On CPUs the own ones are faster, and on an H100
without XLA; with XLA, the others have not been measured there (docs/results.md).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import keras


@dataclass(frozen=True)
class Implementations:
    """What computes each part of a block."""

    attention: Literal["own", "automatic", "library"] = "own"
    """Attention without mask, dropout, chunks and returned weights."""
    layer_norm: Literal["own", "library"] = "own"
    gelu: Literal["own", "library"] = "own"


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
    return _instead[-1] if _instead else chosen_for(keras.backend.backend(), _device())


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
