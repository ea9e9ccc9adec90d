"""A store of artifacts that takes no files is found out before training, and no call to it lasts for ever."""

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_server import TrackingServer

from pipeline.registry.fetch import fetch, is_registered
from pipeline.registry.versions import has_file
from pipeline.tracking import artifacts
from pipeline.tracking.artifacts import check_artifacts, write_probe
from pipeline.tracking.errors import retry_transient
from pipeline.tracking.tracker import Tracker, open_client


@pytest.fixture
def silent() -> Iterator[str]:
    """A store over HTTP that accepts connections and never answers; its URI has a password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://user:geheimnis@127.0.0.1:{server.getsockname()[1]}/api/2.0/mlflow-artifacts/artifacts/x"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "ANSWER_SECONDS", 1.0)


@pytest.mark.usefixtures("soon")
def test_a_store_that_never_answers_is_named_at_once(silent: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = open_client(uri)
    client.create_registered_model("m")  # makes the tables, which may take longer than the rest
    start = time.monotonic()
    with pytest.raises(
        ValueError,
        match=r"the artifacts of the experiment 'e' go to http://.*, which has not answered within 1 s: check that",
    ):
        check_artifacts(uri, "e", silent)
    client.create_model_version("m", silent)
    with pytest.raises(TimeoutError, match="has not answered within 1 s"):
        has_file(silent, "MLmodel", uri)
    with pytest.raises(ValueError, match=r"model = 'models:/m/1': its files cannot be read from .* has not answered"):
        fetch("models:/m/1", uri, tmp_path)
    assert is_registered("models:/m/1", uri), "no reason to register again"
    tracker = Tracker(uri, "e", silent)
    with pytest.raises(
        RuntimeError, match=r"has not answered for 0 s: once it does, run the same command.* store http"
    ):
        retry_transient(lambda: write_probe(tracker), uri, 0)
    assert time.monotonic() - start < 20


def test_a_store_that_takes_files_is_left_as_it_was(tmp_path: Path) -> None:
    check_artifacts(f"sqlite:///{tmp_path}/mlflow.db", "e", f"{tmp_path}/files")
    assert not list((tmp_path / "files").rglob("*.txt"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ValueError, match=r"go to .*/file/below, which takes no file \(.*\): give the keys and the right"
    ):
        check_artifacts(f"sqlite:///{tmp_path}/mlflow.db", "e", f"{tmp_path}/file/below")


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ValueError, match=r"go to s3://bucket/e, for which a library is missing .*boto3.*: install it"):
        check_artifacts(f"sqlite:///{tmp_path}/mlflow.db", "e", "s3://bucket/e")


@pytest.mark.slow  # the start of a server
def test_a_server_passes_files_on_and_says_if_its_own_store_takes_none(tmp_path: Path) -> None:
    server = TrackingServer(tmp_path)
    try:
        check_artifacts(server.uri, "e", None)
        (tmp_path / "files").rename(tmp_path / "away")
        (tmp_path / "files").write_text("no folder")
        with pytest.raises(ValueError, match=r"go to mlflow-artifacts:/\d+, which takes no file"):
            check_artifacts(server.uri, "e", None)
    finally:
        server.kill()


def test_a_server_that_is_gone_is_not_the_matter_of_this_check(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check_artifacts(f"http://127.0.0.1:{port}", "e", None)
