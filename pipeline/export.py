"""A trained classifier as an MLflow model that loads and serves without this project and without pickle."""

import importlib.metadata
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import keras
import mlflow.keras
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

import perceiver.model  # noqa: F401  registers its classes with Keras
from pipeline.registry import CARD_FILE, RETRAIN_FILE

REQUIREMENTS = ("mlflow", "keras", "tensorflow", "numpy")


def export(
    model_path: str,
    folder: Path,
    mlflow_model: Model | None = None,
    *,
    temperature: float,
    input_example: np.ndarray,
    label_names: Sequence[str],
    metadata: dict[str, Any],
    card: str,
) -> None:
    """Writes the MLflow model into the empty `folder`: raw uint8 images (n, H, W, C) to probabilities float32 (n, K).

    It is an exported graph. Beside it lie the `.keras` file, for training on, and the model card.

    Args:
        model_path: `.keras` file of a model: uint8 images to logits.
        mlflow_model: what the registry knows of it so far.
        temperature: by which the logits are divided before the softmax.
        input_example: uint8 images (n, H, W, C).
        label_names: names of the K classes in order; they become part of the metadata.
        metadata: what else the model says of itself.
        card: the model card, in Markdown.
    """
    classifier = keras.saving.load_model(model_path, compile=False)
    images = keras.Input(input_example.shape[1:], dtype="uint8", name="images")
    logits = keras.layers.Rescaling(1 / temperature, dtype="float32", name="temperature")(classifier(images))
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
    signature = ModelSignature(
        # No names: pyfunc would make a dict of a named input, and the exported graph refuses dicts.
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *input_example.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(label_names)))]),
    )
    with redirect_stdout(sys.stderr):  # Keras prints the endpoints that it exports
        mlflow.keras.save_model(
            keras.Model(images, probabilities),
            str(folder),
            save_exported_model=True,
            mlflow_model=mlflow_model,
            signature=signature,
            input_example=input_example,
            # Given, since MLflow would otherwise start a process that loads the model to see what it imports.
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
            metadata={**metadata, "label_names": list(label_names)},
        )
    (folder / RETRAIN_FILE).parent.mkdir()
    shutil.copy(model_path, folder / RETRAIN_FILE)
    (folder / CARD_FILE).write_text(card)
