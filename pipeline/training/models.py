"""Builds the model to be trained, a Perceiver or a model of one's own."""

import json
from dataclasses import asdict

import keras

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.training.outputs import fault_of_outputs
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import OwnModelError

LONGEST_REASON = 400


def build_model(config: PerceiverConfig | OwnModel) -> keras.Model:
    """A built model that is not compiled.

    Raises:
        OwnModelError: if a model of one's own cannot be built, if its files have changed since the run began, if it
            cannot be saved, or if it does not give logits of all classes, but probabilities for instance.
    """
    if isinstance(config, PerceiverConfig):
        model = Perceiver(**asdict(config))
        model.build((None, *config.image_shape))
        return model
    try:
        model = config.build()
    except OwnModelError:
        raise
    except Exception as error:
        raise OwnModelError(f"the builder {config.name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, keras.Model):
        raise OwnModelError(f"the builder {config.name} returns {type(model).__name__}: return a keras.Model")
    try:
        logits = model(keras.KerasTensor((None, *config.image_shape), "uint8"))
    except Exception as error:
        raise OwnModelError(
            f"the model of {config.name} does not take uint8 images {config.image_shape}: {type(error).__name__}: "
            f"{error}"
        ) from error
    shape = getattr(logits, "shape", None)
    if shape != (None, config.num_classes):
        raise OwnModelError(
            f"the model of {config.name} gives {shape or type(logits).__name__}: it should give logits "
            f"{(None, config.num_classes)}"
        )
    if fault := fault_of_outputs(model, config.image_shape):
        raise OwnModelError(f"the model of {config.name} {fault}")
    _check_can_be_saved(model, config.name)
    return model


def _check_can_be_saved(model: keras.Model, name: str) -> None:
    """Does what `save` does with all that is no weight, since that fails after the last epoch otherwise."""
    try:
        json.dumps(keras.saving.serialize_keras_object(model))
    except Exception as error:  # whatever a `get_config` raises
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise OwnModelError(
            f"the model of {name} cannot be saved: {type(error).__name__}: {reason}: give the class of the layer, or "
            "of the model, a `get_config` that returns the arguments of its constructor as numbers, texts and lists "
            "of them"
        ) from error
