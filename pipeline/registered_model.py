"""A registered model by its URI: which version that is, its files, and the classifier in them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlflow import MlflowException
from mlflow.artifacts import download_artifacts
from mlflow.models import Model

from pipeline.tracking import client_of

CHAMPION = "champion"
MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[\w-]+))?")
REMEDY = "give models:/NAME/VERSION, models:/NAME@ALIAS or a folder with an MLmodel file"


@dataclass(frozen=True)
class RegisteredModel:
    """An image classifier that lies in a local folder.

    Attributes:
        uri: with its version, whatever alias led to it.
        folder: its MLflow files.
        uuid: no other logged model has it.
        image_shape: of the uint8 images that it takes: height, width, channels.
        label_names: of the classes whose probabilities it gives, in order.
    """

    uri: str
    folder: Path
    uuid: str
    image_shape: tuple[int, int, int]
    label_names: tuple[str, ...]

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        """The classifier: images uint8 (N, H, W, C) to probabilities float32 (N, K). Loads TensorFlow."""
        import mlflow.pyfunc

        return mlflow.pyfunc.load_model(str(self.folder)).predict


def resolve(uri: str, tracking_uri: str | None) -> str:
    """`models:/NAME/VERSION` of a model URI; a folder as it is.

    Args:
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `models:/NAME` (the champion), or a folder.
        tracking_uri: of the registry; needed unless `uri` is a folder.

    Raises:
        ValueError: if there is no such model.
    """
    if (Path(uri) / "MLmodel").is_file():
        return str(Path(uri).resolve())
    if (parts := MODEL_URI.fullmatch(uri)) is None:
        raise ValueError(f"model = {uri!r}: {REMEDY}")
    if tracking_uri is None:
        raise ValueError(f"model = {uri!r}: give --tracking-uri, that of the registry in which it is")
    name, version = parts["name"], parts["version"]
    client = client_of(tracking_uri)
    try:
        if version is None:
            version = client.get_model_version_by_alias(name, parts["alias"] or CHAMPION).version
        else:
            client.get_model_version(name, version)
    except MlflowException as error:
        raise ValueError(f"model = {uri!r} is not in {tracking_uri}: {error.message}") from error
    return f"models:/{name}/{version}"


def version_tags(uri: str, tracking_uri: str | None) -> dict[str, str]:
    """Tags of the version `models:/NAME/VERSION`; none of a folder."""
    parts = MODEL_URI.fullmatch(uri)
    if parts is None or parts["version"] is None:
        return {}
    client = client_of(tracking_uri)
    return dict(client.get_model_version(parts["name"], parts["version"]).tags)


def fetch_file(uri: str, tracking_uri: str | None, file: str, folder: Path) -> Path:
    """One of the files of a model, copied below `folder`.

    Raises:
        ValueError: as `resolve`, or if the model has no such file.
    """
    pinned = resolve(uri, tracking_uri)
    if not pinned.startswith("models:/"):
        return Path(pinned) / file
    parts = MODEL_URI.fullmatch(pinned)
    assert parts is not None
    client = client_of(tracking_uri)
    source = client.get_model_version(parts["name"], parts["version"]).source
    try:
        path = download_artifacts(artifact_uri=f"{source}/{file}", dst_path=str(folder), tracking_uri=tracking_uri)
    except (MlflowException, OSError) as error:
        raise ValueError(f"model = {uri!r} has no file {file}: it was not registered by this pipeline") from error
    return Path(path)


def registered_uris(tracking_uri: str) -> set[str]:
    """`models:/NAME/VERSION` of every registered version."""
    client = client_of(tracking_uri)
    found, token = set(), None
    while True:
        page = client.search_model_versions(page_token=token)
        found |= {f"models:/{version.name}/{version.version}" for version in page}
        if not (token := page.token):
            return found


def fetch(uri: str, tracking_uri: str | None, folder: Path) -> RegisteredModel:
    """A model in a local folder; one from a registry is copied below `folder`.

    Raises:
        ValueError: as `resolve`, or if it is no image classifier with class names in its metadata.
    """
    pinned = resolve(uri, tracking_uri)
    local = Path(pinned)
    if (parts := MODEL_URI.fullmatch(pinned)) is not None:
        # Not by the URI of the model: MLflow looks that up in the registry of the environment, not in this one.
        client = client_of(tracking_uri)
        source = client.get_model_version_download_uri(parts["name"], parts["version"])
        local = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri))
    return describe(local, pinned)


def describe(folder: Path, uri: str) -> RegisteredModel:
    """The model whose files lie in `folder`.

    Raises:
        ValueError: if it is no image classifier with class names in its metadata.
    """
    model = Model.load(str(folder))
    metadata: Mapping[str, object] = model.metadata or {}
    names = metadata.get("label_names")
    inputs = model.signature.inputs.inputs if model.signature is not None else []
    shape = tuple(getattr(inputs[0], "shape", ())) if len(inputs) == 1 else ()
    if not isinstance(names, list) or len(shape) != 4 or inputs[0].type != np.uint8:
        raise ValueError(
            f"model = {uri!r} does not take one array of uint8 images (N, H, W, C), or has no label_names in its "
            "metadata: it was not registered by this pipeline"
        )
    return RegisteredModel(uri, folder, str(model.model_uuid), shape[1:], tuple(map(str, names)))
