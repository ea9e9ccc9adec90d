"""Which parts of a model are frozen (`trainable = False`), as a list that its config can hold.

Keras stores `trainable` of the layers that a config lists: in a functional model, all of them. The layers of a
Perceiver, and of its blocks, are made in `build`, so that a loaded model would train all of them again.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras


class LayerWithParts(keras.layers.Layer):
    """A layer that makes other layers in `build`, which ends with `freeze`, and whose config lists the frozen ones.

    Args:
        frozen: Paths of layers and weights, below this one, whose `trainable` is false once it is built.
    """

    def __init__(self, *, frozen: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._frozen = tuple(frozen)

    def freeze(self) -> None:
        """Freezes the parts that are listed, once they are made."""
        freeze_parts(self, self._frozen)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **frozen_config(self, self._frozen)}


def frozen_config(model: keras.Layer, frozen: Sequence[str]) -> dict[str, Any]:
    """The argument `frozen` of the config of a model or layer, for which it is `frozen` until it is built."""
    found = frozen_parts(model) if model.built else list(frozen)
    return {"frozen": found} if found else {}  # only where there are any, so that earlier versions read the others


def frozen_parts(model: keras.Layer) -> list[str]:
    """Paths, below the model or layer, of the layers and the weights that are frozen in it; it has to be built.

    Empty if it is frozen as a whole, which Keras itself stores.
    """
    return [path for path, part in _parts(model) if not part.trainable] if model.trainable else []


def freeze_parts(model: keras.Layer, paths: Iterable[str]) -> None:
    """Freezes the parts of a built model or layer that `frozen_parts` has named.

    Raises:
        ValueError: if the model has no such part.
    """
    if not (frozen := set(paths)):
        return
    parts = list(_parts(model))
    if unknown := sorted(frozen - {path for path, _ in parts}):
        raise ValueError(f"frozen = {unknown}: the model has no such layers or weights")
    # Layers come before what is in them, which takes over their value when it is set.
    for path, part in parts:
        part.trainable = path not in frozen


def _parts(model: keras.Layer) -> Iterator[tuple[str, keras.Layer | keras.Variable]]:
    """All layers and weights, with their paths below the model; those without weights have no path."""
    start = f"{model.path}/"
    for layer in model._flatten_layers(include_self=False):
        if layer.path and layer.weights:
            yield layer.path.removeprefix(start), layer
    for weight in model.weights:
        yield weight.path.removeprefix(start), weight
