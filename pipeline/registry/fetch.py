"""Finds a registered model by its URI, downloads it, and loads its classifier."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from mlflow.artifacts import download_artifacts
from mlflow.models import Model

from pipeline.tracking.tracker import TrackingError, open_client

CHAMPION = "champion"
MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[\w-]+))?")
REMEDY = "give models:/NAME/VERSION, models:/NAME@ALIAS or a folder with an MLmodel file"


@dataclass(frozen=True)
class RegisteredModel:
    """An image classifier in a local folder.

    Attributes:
        uri: URI with the version number, also if an alias was given; or the folder.
        folder: Folder of the MLflow model.
        uuid: Unique id of the logged model.
        image_shape: Height, width and channels of the uint8 images that it takes.
        label_names: Names of the classes, in the order of the probabilities.
        resize: How images of another size were fitted in training; None if they were not, or it is not known.
    """

    uri: str
    folder: Path
    uuid: str
    image_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    resize: Literal["crop", "pad", "stretch"] | None = None

    @classmethod
    def from_folder(cls, folder: Path, uri: str) -> "RegisteredModel":
        """Reads the description of the MLflow model in `folder`; does not load the model.

        Raises:
            ValueError: If it is not an image classifier with class names in its metadata.
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
        decoding = metadata.get("decoding")
        resize = decoding.get("resize") if isinstance(decoding, Mapping) else None
        return cls(uri, folder, str(model.model_uuid), shape[1:], tuple(map(str, names)), resize)

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        """Loads the classifier, and TensorFlow: images, uint8 (N, H, W, C), to probabilities, float32 (N, K)."""
        import mlflow.pyfunc

        return mlflow.pyfunc.load_model(str(self.folder)).predict


def resolve(uri: str, tracking_uri: str | None) -> str:
    """Replaces an alias by the version: returns `models:/NAME/VERSION`, or the absolute path of a folder.

    Args:
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `models:/NAME` (the champion), or a folder.
        tracking_uri: URI of the registry; required unless `uri` is a folder.

    Raises:
        ValueError: If there is no such model.
    """
    if (Path(uri) / "MLmodel").is_file():
        return str(Path(uri).resolve())
    if (parts := MODEL_URI.fullmatch(uri)) is None:
        raise ValueError(f"model = {uri!r}: {REMEDY}")
    if tracking_uri is None:
        raise ValueError(f"model = {uri!r}: give --tracking-uri, the URI of its registry")
    name, version = parts["name"], parts["version"]
    client = open_client(tracking_uri)
    try:
        if version is None:
            version = client.get_model_version_by_alias(name, parts["alias"] or CHAMPION).version
        else:
            client.get_model_version(name, version)
    except TrackingError as error:
        raise ValueError(f"model = {uri!r} is not in {tracking_uri}: {error.message}") from error
    return f"models:/{name}/{version}"


def version_tags(uri: str, tracking_uri: str | None) -> dict[str, str]:
    """Tags of the version `models:/NAME/VERSION`; empty for a folder."""
    parts = MODEL_URI.fullmatch(uri)
    if parts is None or parts["version"] is None:
        return {}
    client = open_client(tracking_uri)
    return dict(client.get_model_version(parts["name"], parts["version"]).tags)


def fetch_file(uri: str, tracking_uri: str | None, file: str, folder: Path) -> Path:
    """Downloads one file of a model into `folder`; returns its path. If the model is a folder, the file is not copied.

    Raises:
        ValueError: As `resolve`, or if the model has no such file.
    """
    pinned = resolve(uri, tracking_uri)
    if (parts := MODEL_URI.fullmatch(pinned)) is None:
        return Path(pinned) / file
    client = open_client(tracking_uri)
    source = client.get_model_version(parts["name"], parts["version"]).source
    try:
        path = download_artifacts(artifact_uri=f"{source}/{file}", dst_path=str(folder), tracking_uri=tracking_uri)
    except (TrackingError, OSError) as error:
        raise ValueError(f"model = {uri!r} has no file {file}: it was not registered by this pipeline") from error
    return Path(path)


def registered_uris(tracking_uri: str) -> set[str]:
    """`models:/NAME/VERSION` of every version in a registry."""
    client = open_client(tracking_uri)
    found, token = set(), None
    while True:
        page = client.search_model_versions(page_token=token)
        found |= {f"models:/{version.name}/{version.version}" for version in page}
        if not (token := page.token):
            return found


def fetch(uri: str, tracking_uri: str | None, folder: Path) -> RegisteredModel:
    """Downloads a model into `folder`; a model that is a local folder is not copied.

    Raises:
        ValueError: As `resolve`, or if the model is not an image classifier with class names in its metadata.
    """
    pinned = resolve(uri, tracking_uri)
    local = Path(pinned)
    if (parts := MODEL_URI.fullmatch(pinned)) is not None:
        # Not by the URI of the model: MLflow would look that up in the registry of the environment.
        client = open_client(tracking_uri)
        source = client.get_model_version_download_uri(parts["name"], parts["version"])
        local = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri))
    return RegisteredModel.from_folder(local, pinned)
