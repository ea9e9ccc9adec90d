"""A Keras 3 Perceiver: `Perceiver`, its `PerceiverConfig`, and `attention_maps`."""

from typing import Any

from perceiver.config import PerceiverConfig

__all__ = ["Perceiver", "PerceiverConfig", "attention_maps"]


def __getattr__(name: str) -> Any:
    """Imports the model, and Keras with it, only when it is asked for: settings alone have to be quick."""
    if name not in ("Perceiver", "attention_maps"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from perceiver import model

    return getattr(model, name)
