"""The store of MLflow's artifacts: whether it takes files, and calls to it that end although it does not answer.

The tracking server may be well while its artifacts lie elsewhere, where this machine has no key, library or route.
Models go there only after training, so a file is written there before.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import urlsplit

from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipeline.contact import MAY_HANG, check_path
from pipeline.tracking.errors import TrackingError, is_conflict, is_transient
from pipeline.tracking.tracker import Tracker

ANSWER_SECONDS = 10.0
"""How long the store may take for a small file or a listing. The libraries of the clouds wait for minutes."""
TRANSFER_SECONDS = 600.0
"""How long it may take for the files of a model."""
T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], store: str) -> T:
    """`call()`, on a thread that is left behind if it has not returned in time.

    Args:
        store: what is called, for the message.

    Raises:
        TimeoutError: after `seconds`.
        Exception: that of `call`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    # A daemon, which does not keep the process from ending.
    thread = threading.Thread(target=work, name=f"{MAY_HANG}artifacts", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"{store} has not answered within {seconds:g} s")
    return results[0]


def list_files(uri: str, tracking_uri: str | None) -> list[str]:
    """Paths of the artifacts directly below `uri`; empty if it is a file, or nothing is there.

    Raises:
        TimeoutError: if their store does not answer within `ANSWER_SECONDS`.
        MlflowException, OSError: whatever MLflow raises of it.
    """
    found = within(
        ANSWER_SECONDS, lambda: list_artifacts(artifact_uri=uri, tracking_uri=tracking_uri), f"the artifact store {uri}"
    )
    return [entry.path for entry in found]


def download(uri: str, tracking_uri: str | None, folder: str | Path) -> Path:
    """Copies the artifact, or the folder of artifacts, at `uri` into `folder`; returns its path.

    Raises:
        TimeoutError: if the store does not answer, or takes longer than `TRANSFER_SECONDS`.
        MlflowException, OSError: whatever MLflow raises of it.
    """
    list_files(uri, tracking_uri)  # a store that is gone is found out in seconds
    path = within(
        TRANSFER_SECONDS,
        lambda: download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=tracking_uri),
        f"the artifact store {uri}",
    )
    return Path(path)


def write_probe(tracker: Tracker) -> None:
    """Writes a small file to the artifacts of the experiment, and deletes it if that is allowed.

    Raises:
        TimeoutError: after `ANSWER_SECONDS`.
        Exception: whatever the library of the store raises.
    """
    location = tracker.artifact_location
    name = f"contact-{uuid.uuid4().hex[:12]}.txt"

    def write() -> None:
        store = get_artifact_repository(location, tracking_uri=tracker.uri)
        with TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_text("written to find out whether this store takes files\n")
            store.log_artifact(str(file))
        with contextlib.suppress(Exception):  # not everybody who may write may delete
            store.delete_artifacts(name)

    within(ANSWER_SECONDS, write, f"the artifact store {location}")


def check_artifacts(tracking_uri: str, experiment: str, artifact_location: str | None) -> None:
    """Checks that the store takes the artifacts of an experiment, before anything is started.

    A tracking server that does not answer is not the matter of this check.

    Raises:
        ValueError: if it takes none, if the server refuses the login or lets it only read, or if it is too old; names
            the location and the remedy.
    """
    try:
        tracker = Tracker(tracking_uri, experiment, artifact_location)
        tracker.check_writing()
    except TrackingError as error:
        if is_transient(error) or is_conflict(error):
            return
        raise ValueError(f"tracking.uri = {tracking_uri}: the server refuses the experiment: {error}") from error
    location = tracker.artifact_location
    where = f"tracking.uri = {tracking_uri}: the artifacts of the experiment {experiment!r} go to {location}, "
    scheme = urlsplit(location).scheme
    if scheme in ("", "file"):
        check_path(urlsplit(location).path, "tracking.uri, whose artifacts")
    try:
        write_probe(tracker)
    except TimeoutError as error:
        raise ValueError(
            f"{where}which has not answered within {ANSWER_SECONDS:g} s: check that "
            f"{'the tracking server' if scheme == 'mlflow-artifacts' else 'this machine'} reaches it, or give another "
            "--tracking.experiment, with a store that answers"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"{where}for which a library is missing ({error}): install it on all hosts (boto3 for s3://), or start "
            "the tracking server with --serve-artifacts, so that it alone needs it"
        ) from error
    except Exception as error:  # each library of a cloud has errors of its own
        said = " ".join(str(error).split())[:400] or type(error).__name__
        remedy = (
            "the tracking server runs on another machine: start it with --serve-artifacts"
            if scheme in ("", "file") and tracking_uri.startswith("http")
            else "give the keys and the right to write there"
        )
        raise ValueError(
            f"{where}which takes no file ({said}): {remedy}, or give another --tracking.experiment"
        ) from error
