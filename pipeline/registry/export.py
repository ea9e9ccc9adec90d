"""Exports a trained classifier as an MLflow model that can be loaded and served without this project or pickle."""

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
from pipeline.registry.versions import CARD_FILE, RETRAIN_FILE

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
    """Writes the model as an exported graph: raw images, uint8 (n, H, W, C), to probabilities, float32 (n, K).

    The `.keras` file, for further training, and the model card are copied next to it.

    Args:
        model_path: `.keras` file of a model: uint8 images to logits.
        folder: Empty folder for the files.
        mlflow_model: Metadata of the logged model that these files belong to.
        temperature: Divisor of the logits before the softmax.
        input_example: Images, uint8 (n, H, W, C).
        label_names: Names of the K classes, in order; they become part of the metadata.
        metadata: Further metadata of the model.
        card: Model card in Markdown.
    """
    classifier = keras.saving.load_model(model_path, compile=False)
    images = keras.Input(input_example.shape[1:], dtype="uint8", name="images")
    logits = keras.layers.Rescaling(1 / temperature, dtype="float32", name="temperature")(classifier(images))
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
    signature = ModelSignature(
        # Unnamed: pyfunc passes a named input as a dict, which the exported graph does not accept.
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *input_example.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(label_names)))]),
    )
    with redirect_stdout(sys.stderr):  # Keras prints the exported endpoints
        mlflow.keras.save_model(
            keras.Model(images, probabilities),
            str(folder),
            save_exported_model=True,
            mlflow_model=mlflow_model,
            signature=signature,
            input_example=input_example,
            # Without these, MLflow starts a process that loads the model to find out what it imports.
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
            metadata={**metadata, "label_names": list(label_names)},
        )
    (folder / RETRAIN_FILE).parent.mkdir()
    shutil.copy(model_path, folder / RETRAIN_FILE)
    (folder / CARD_FILE).write_text(card)
