"""Which parts of a model are frozen (`trainable = False`), as a list that its config can hold.

Keras stores `trainable` of the layers that a config lists: in a functional model, all of them. The layers of a
Perceiver are made in its `build`, so that a loaded model would train all of them again.
"""

from collections.abc import Iterable, Iterator

import keras


def frozen_parts(model: keras.Model) -> list[str]:
    """Paths, below the model, of the layers and the weights of a built model that are frozen.

    Empty if the model is frozen as a whole, which Keras itself stores.
    """
    return [path for path, part in _parts(model) if not part.trainable] if model.trainable else []


def freeze_parts(model: keras.Model, paths: Iterable[str]) -> None:
    """Freezes the parts of a built model that `frozen_parts` has named.

    Raises:
        ValueError: if the model has no such part.
    """
    frozen = set(paths)
    parts = list(_parts(model))
    if unknown := sorted(frozen - {path for path, _ in parts}):
        raise ValueError(f"frozen = {unknown}: the model has no such layers or weights")
    if frozen:
        # Layers come before what is in them, which takes over their value when it is set.
        for path, part in parts:
            part.trainable = path not in frozen


def _parts(model: keras.Model) -> Iterator[tuple[str, keras.Layer | keras.Variable]]:
    """All layers and weights, with their paths below the model; those without weights have no path."""
    start = f"{model.path}/"
    for layer in model._flatten_layers(include_self=False):
        if layer.path and layer.weights:
            yield layer.path.removeprefix(start), layer
    for weight in model.weights:
        yield weight.path.removeprefix(start), weight
