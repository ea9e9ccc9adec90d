"""Small image classifiers as files, as MLflow models, and as registered versions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perceiver.config import PerceiverConfig
from pipeline.registry.config import PromotionConfig
from pipeline.registry.promotion import Evidence
from pipeline.tracking.tracker import Tracker

IMAGE_SHAPE = (8, 6, 3)
LABEL_NAMES = ["left", "middle", "right"]


def expected_probabilities(images: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """Probabilities of the model of `save_model`, computed with NumPy."""
    kernel, bias = weights
    logits = images.reshape(len(images), -1) / 255 @ kernel + bias
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def save_model(folder: Path, *, image_shape: tuple[int, int, int] = IMAGE_SHAPE, **metadata: Any) -> list[np.ndarray]:
    """Writes an MLflow model with this metadata: uint8 images to probabilities; returns its weights."""
    import keras
    import mlflow.keras
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    keras.utils.set_random_seed(0)
    images = keras.Input(image_shape, dtype="uint8")
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images))
    model = keras.Model(images, keras.layers.Dense(len(LABEL_NAMES), activation="softmax")(flat))
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *image_shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(LABEL_NAMES)))]),
    )
    mlflow.keras.save_model(
        model,
        str(folder),
        save_exported_model=True,
        signature=signature,
        pip_requirements=["keras", "mlflow"],
        metadata={"label_names": LABEL_NAMES, **metadata},
    )
    return model.get_weights()


def register_model(folder: Path, tracking_uri: str, name: str) -> None:
    """Registers the model in `folder` as the first version and the champion of `name`."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    client.create_registered_model(name)
    version = client.create_model_version(name, source=str(folder))
    client.set_registered_model_alias(name, "champion", version.version)


def save_perceiver(config: PerceiverConfig, path: Path) -> str:
    """Writes an untrained Perceiver as a `.keras` file; returns the path."""
    import keras

    from perceiver.model import Perceiver

    keras.utils.set_random_seed(0)
    model = Perceiver(**asdict(config))
    model(np.zeros((1, *config.image_shape), np.uint8))
    model.save(path)
    return str(path)


def register_perceiver(
    tracker: Tracker,
    name: str,
    model_path: str,
    label_names: Sequence[str],
    input_example: np.ndarray,
    temperature: float,
    evidence: Evidence,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Exports and registers a `.keras` file as the pipeline does; the model card consists of its title."""
    from pipeline.registry.export import export
    from pipeline.registry.versions import register

    return register(
        tracker,
        name=name,
        identity=name,
        run_id=tracker.find_or_create_run("register", name),
        export=partial(
            export,
            model_path,
            temperature=temperature,
            input_example=input_example,
            label_names=label_names,
            metadata=dict(metadata or {}),
            card=f"# {name}\n",
        ),
        evidence=evidence,
        label_names=label_names,
        promotion=PromotionConfig(),
    )
