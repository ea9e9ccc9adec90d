"""A small image classifier as an MLflow model folder, and a registry that has it."""

from pathlib import Path

import numpy as np

IMAGE_SHAPE = (8, 6, 3)
LABEL_NAMES = ["left", "middle", "right"]


def expected_probabilities(images: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """What the model of `save_model` says, in NumPy."""
    kernel, bias = weights
    logits = images.reshape(len(images), -1) / 255 @ kernel + bias
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def save_model(folder: Path) -> list[np.ndarray]:
    """Writes a model that takes uint8 images and gives probabilities; returns its weights."""
    import keras
    import mlflow.keras
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    keras.utils.set_random_seed(0)
    images = keras.Input(IMAGE_SHAPE, dtype="uint8")
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images))
    model = keras.Model(images, keras.layers.Dense(len(LABEL_NAMES), activation="softmax")(flat))
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *IMAGE_SHAPE))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(LABEL_NAMES)))]),
    )
    mlflow.keras.save_model(
        model,
        str(folder),
        save_exported_model=True,
        signature=signature,
        pip_requirements=["keras", "mlflow"],
        metadata={"label_names": LABEL_NAMES},
    )
    return model.get_weights()


def register_model(folder: Path, tracking_uri: str, name: str) -> None:
    """Makes the model in `folder` the first version and the champion of `name`."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    client.create_registered_model(name)
    version = client.create_model_version(name, source=str(folder))
    client.set_registered_model_alias(name, "champion", version.version)
