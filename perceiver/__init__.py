"""A Perceiver image classifier in Keras 3 (Jaegle et al., 2021, arXiv:2103.03206), usable without the pipeline.

model.py                   `Perceiver`, from uint8 images to logits, and `attention_maps`
config.py                  `PerceiverConfig`, its settings
config_checks.py           which values of them, and which together, are refused
presets.py                 named settings
freezing.py                which parts of a model are frozen, for its config
cost.py                    parameters, multiply-accumulates and activation memory of a config
preprocessing.py           images to rows of the data array: normalisation, patches, convolutional stem
whitening.py               decorrelation of patches by the covariance of natural images
position_encoding.py       Fourier features and learned positions
blocks.py                  cross-attention and self-attention block, MLP
attention.py               multi-head attention
spatial_prior.py           where its heads look before they know the image
dot_product_attention.py   its core, with a backward pass of its own
chunked_attention.py       the same in bounded memory, over chunks of the inputs
normalization.py           LayerNorm with a backward pass of its own
gelu.py                    GELU with a backward pass of its own
implementations.py         which of these and of Keras's own is used, by backend and device
processor.py               name, architecture and bfloat16 kernels of this host's processor
"""

from typing import Any

from perceiver.config import PerceiverConfig

__all__ = ["Perceiver", "PerceiverConfig", "attention_maps"]


def __getattr__(name: str) -> Any:
    """Imports the model, and Keras with it, on first use, so that the settings alone import fast."""
    if name not in ("Perceiver", "attention_maps"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from perceiver import model

    return getattr(model, name)
