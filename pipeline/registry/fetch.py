"""Finds a registered model by its URI, downloads it, and loads its classifier."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from mlflow.models import Model

from pipeline.contact import check_path
from pipeline.registry.probabilities import checked
from pipeline.registry.versions import has_file
from pipeline.tracking.artifacts import download
from pipeline.tracking.errors import TrackingError, is_transient
from pipeline.tracking.server import check_server, has_database
from pipeline.tracking.tracker import open_client

CHAMPION = "champion"
MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[\w-]+))?")
EXPECTED_PYTHON = ("env", "loader_module", "python_version")
"""What MLflow writes of a `python_function` that has no code of its own."""
_DESCRIPTION_BYTES = 16 << 20
"""Of an MLmodel file, which is mostly names of classes; YAML takes a hundred times as much memory."""
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
    def from_folder(cls, folder: Path, uri: str, trust: bool = False) -> "RegisteredModel":
        """Reads the description of the MLflow model in `folder`; does not load the model.

        Args:
            folder: Folder with an MLmodel file.
            uri: Its URI.
            trust: Whether a model may be of another kind than this pipeline exports.

        Raises:
            ValueError: If it is not an image classifier with class names in its metadata, or of another kind.
        """
        try:
            if (size := (folder / "MLmodel").stat().st_size) > _DESCRIPTION_BYTES:
                raise ValueError(f"it has {size:,} bytes")
            model = Model.load(str(folder))
        except Exception as error:  # of a file that is no MLmodel: a YAML error, a KeyError, a TypeError
            raise ValueError(f"model = {uri!r} has no MLmodel file that can be read: {error}") from error
        if not trust:
            _check_kind(model, uri)
        metadata: Mapping[str, object] = model.metadata or {}
        names = metadata.get("label_names")
        schema = model.signature.inputs if model.signature is not None else None
        inputs = schema.inputs if schema is not None else []
        shape = tuple(getattr(inputs[0], "shape", ())) if len(inputs) == 1 else ()
        # Names that are lists of lists of ... of one another would take for ever to write down.
        are_names = isinstance(names, list) and all(isinstance(name, str | int) for name in names)
        is_shape = len(shape) == 4 and all(isinstance(size, int) and size > 0 for size in shape[1:])
        if not are_names or not is_shape or inputs[0].type != np.uint8:
            takes = f"the inputs {str(inputs)[:300]}" if inputs else "no inputs"
            named = "" if are_names else "no " if names is None else f"{type(names).__name__}, not a list of names, as "
            raise ValueError(
                f"model = {uri!r} has {takes} in its signature and {named}label_names in its metadata: log it with a "
                "signature of one uint8 array (-1, H, W, C), with numbers for H, W and C, and with the names of its "
                "classes as the list label_names in its metadata"
            )
        assert isinstance(names, list)
        decoding = metadata.get("decoding")
        resize = decoding.get("resize") if isinstance(decoding, Mapping) else None
        return cls(uri, folder, str(model.model_uuid), shape[1:], tuple(map(str, names)), resize)

    def load(self) -> Callable[[np.ndarray], np.ndarray]:
        """Loads the classifier, and TensorFlow: images, uint8 (N, H, W, C), to probabilities, float32 (N, K).

        Each call of the classifier raises a ValueError if what the model gives is none, as `checked` says.
        """
        import mlflow.pyfunc

        predict = mlflow.pyfunc.load_model(str(self.folder)).predict
        return lambda images: checked(predict(images), len(images), len(self.label_names), self.uri)


def _check_kind(model: Model, uri: str) -> None:
    """Checks that loading the model runs none of its Python code: that it is an exported Keras model as of `export`.

    Raises:
        ValueError: If it is not; says how.
    """
    python, keras = (model.flavors.get(flavor, {}) for flavor in ("python_function", "keras"))
    found = [
        *(f"the flavor {flavor!r}" for flavor in sorted(model.flavors.keys() - {"python_function", "keras"})),
        *(f"{name} = {value!r}" for name, value in python.items() if name not in EXPECTED_PYTHON),
    ]
    if python.get("loader_module") != "mlflow.keras":
        found.append(f"loader_module = {python.get('loader_module')!r}")
    if keras.get("save_exported_model") is not True or keras.get("data") != "data" or "code" in keras:
        found.append("no exported Keras model")
    if found:
        raise ValueError(
            f"model = {uri!r} may run code when it is loaded, for it has {', '.join(found)[:500]}: it was not exported "
            "by this pipeline; give --trust if you trust whoever made it"
        )


def resolve(uri: str, tracking_uri: str | None) -> str:
    """Replaces an alias by the version: returns `models:/NAME/VERSION`, or the absolute path of a folder.

    Args:
        uri: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `models:/NAME` (the champion), or a folder.
        tracking_uri: URI of the registry; required unless `uri` is a folder.

    Raises:
        ValueError: If there is no such model.
    """
    if not uri.startswith("models:/"):
        check_path(uri, "model")
    if (Path(uri) / "MLmodel").is_file():
        return str(Path(uri).resolve())
    if (parts := MODEL_URI.fullmatch(uri)) is None:
        raise ValueError(f"model = {uri!r}: {REMEDY}")
    if tracking_uri is None:
        raise ValueError(f"model = {uri!r}: give --tracking-uri, the URI of its registry")
    if not has_database(tracking_uri):  # MLflow would create an empty one
        raise ValueError(f"model = {uri!r}: {_no_registry(tracking_uri)}")
    if not tracking_uri.startswith(("http://", "https://")):  # a server is asked below, with more patience
        check_server(tracking_uri)
    name, version = parts["name"], parts["version"]
    client = open_client(tracking_uri)
    try:
        if version is None:
            version = client.get_model_version_by_alias(name, parts["alias"] or CHAMPION).version
        else:
            client.get_model_version(name, version)
    except TrackingError as error:
        state = f"{tracking_uri} does not answer" if is_transient(error) else f"it is not in {tracking_uri}"
        raise ValueError(f"model = {uri!r}: {state}: {error.message}") from error
    return f"models:/{name}/{version}"


def _no_registry(tracking_uri: str) -> str:
    """Says why there is no registry in the SQLite file of a URI, and the remedy."""
    file = Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    why = f"{file} is no database of MLflow" if file.exists() else f"{file} is not there"
    return (
        f"tracking-uri = {tracking_uri}: {why}: give --tracking-uri the URI of the registry: http://HOST:PORT, or "
        "sqlite:/// and the path of a file that is there, such as the mlflow.db of a storage folder"
    )


def is_registered(uri: str, tracking_uri: str) -> bool:
    """Whether the registry has the version `models:/NAME/VERSION` and its files.

    A registry that does not answer is taken at its word of before: it is no reason to register again.
    """
    parts = MODEL_URI.fullmatch(uri)
    assert parts is not None
    if not has_database(tracking_uri):
        return False
    try:
        check_server(tracking_uri)
        version = open_client(tracking_uri).get_model_version(parts["name"], parts["version"])
        return has_file(str(version.source), "MLmodel", tracking_uri)
    except (TrackingError, OSError, ValueError, ImportError) as error:
        return not (isinstance(error, TrackingError) and error.error_code == "RESOURCE_DOES_NOT_EXIST")


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
        return download(f"{source}/{file}", tracking_uri, folder)
    except TimeoutError as error:
        raise ValueError(f"model = {uri!r}: its files cannot be read: {error}") from error
    except (TrackingError, OSError) as error:
        raise ValueError(f"model = {uri!r} has no file {file}: it was not registered by this pipeline") from error


def check_file(uri: str, tracking_uri: str, file: str) -> None:
    """Checks that a registered version has a file, which may be large, without downloading it.

    Raises:
        ValueError: As `fetch_file`.
    """
    parts = MODEL_URI.fullmatch(resolve(uri, tracking_uri))
    assert parts is not None
    try:
        version = open_client(tracking_uri).get_model_version(parts["name"], parts["version"])
        is_there = has_file(str(version.source), file, tracking_uri)
    except (TrackingError, OSError, ImportError) as error:
        raise ValueError(f"model = {uri!r}: its files cannot be read: {error}") from error
    if not is_there:
        raise ValueError(
            f"model = {uri!r} has no file {file}: it was not registered by this pipeline, or its files are gone"
        )


def registered_uris(tracking_uri: str) -> set[str]:
    """`models:/NAME/VERSION` of every version in a registry.

    Raises:
        ValueError: If there is none, which MLflow would create.
    """
    if not has_database(tracking_uri):
        raise ValueError(_no_registry(tracking_uri))
    client = open_client(tracking_uri)
    found, token = set(), None
    while True:
        page = client.search_model_versions(page_token=token)
        found |= {f"models:/{version.name}/{version.version}" for version in page}
        if not (token := page.token):
            return found


def fetch(uri: str, tracking_uri: str | None, folder: Path, trust: bool = False) -> RegisteredModel:
    """Downloads a model into `folder`; a model that is a local folder is not copied.

    Raises:
        ValueError: As `resolve` and `RegisteredModel.from_folder`, which also says what `trust` is.
    """
    pinned = resolve(uri, tracking_uri)
    local = Path(pinned)
    if (parts := MODEL_URI.fullmatch(pinned)) is not None:
        # Not by the URI of the model: MLflow would look that up in the registry of the environment.
        client = open_client(tracking_uri)
        source = client.get_model_version_download_uri(parts["name"], parts["version"])
        try:
            local = download(source, tracking_uri, folder)
        except (TrackingError, OSError, ImportError) as error:
            raise ValueError(f"model = {uri!r}: its files cannot be read from {source}: {error}") from error
    return RegisteredModel.from_folder(local, pinned, trust)
