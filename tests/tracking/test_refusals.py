"""What a server, a proxy before it or a store refuses: at once, once, or until somebody mends it."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Storage
from pipeline.tracking.artifacts import check_artifacts
from pipeline.tracking.errors import is_transient, retry_transient
from pipeline.tracking.outbox import Record, has_waiting
from pipeline.tracking.sender import Sender
from pipeline.tracking.tracker import Tracker

Answer = tuple[int, str]
# As the library of S3 has it, which is not installed with this project.
ConnectionClosed = type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})
EXPERIMENT = json.dumps({"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}})


@contextlib.contextmanager
def server(answer: Callable[[str, str, bytes], Answer]) -> Iterator[str]:
    """URI of a server that answers each request, of a method, a path and a body, with a status and a text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = answer(self.command, self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of an SQLite store; to make its tables takes longer than a test."""
    folder = tmp_path_factory.mktemp("store")
    Tracker(f"sqlite:///{folder}/mlflow.db", "e", f"{folder}/files")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.mark.parametrize("status", [401, 403])
def test_a_gateway_that_refuses_the_login_in_its_own_words_is_not_asked_again(status: int, tmp_path: Path) -> None:
    """As those of clouds answer: JSON without an error code of MLflow."""
    with server(lambda *_: (status, '{"message": "No key was found in the request"}')) as uri:
        start = time.monotonic()
        for call in (
            lambda: check_artifacts(uri, "e", None),
            lambda: retry_transient(lambda: Tracker(uri, "e"), uri, 600),
        ):
            with pytest.raises(ValueError, match=r"refuses the login.*No key was found.*MLFLOW_TRACKING_USERNAME"):
                call()
        assert time.monotonic() - start < 10
        sender = Sender(lambda: Tracker(uri, "e"), Storage(str(tmp_path)), "gateway", "e")
        sender.record(Record("train", metrics={"loss": 1.0}))
        unsent = sender.close(1)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (1, 0)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("set-experiment-tag", (403, '{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'), "rights"),
        ("logged-models", (404, "<h1>Not Found</h1>"), "does not know logged models, .* install a newer MLflow there"),
    ],
)
def test_a_server_that_would_record_nothing_is_refused_at_once(path: str, answer: Answer, message: str) -> None:
    """A login that may only read, and a server of MLflow 2; both find the experiment."""

    def answered(method: str, asked: str, body: bytes) -> Answer:
        return answer if path in asked else (200, EXPERIMENT if "get-by-name" in asked else "{}")

    with server(answered) as uri, pytest.raises(ValueError, match=f"tracking.uri = {uri}: the server.*{message}"):
        check_artifacts(uri, "e", None)


def test_a_file_that_is_too_large_for_a_proxy_holds_up_nothing_else(store: str, tmp_path: Path) -> None:
    taken: list[str] = []

    def answered(method: str, path: str, body: bytes) -> Answer:
        if len(body) > 1000:
            return 413, "<h1>413 Request Entity Too Large</h1>"
        taken.append(path.rpartition("/")[2])
        return 200, "{}"

    with server(answered) as uri:
        place = f"{uri}/api/2.0/mlflow-artifacts/artifacts/x"
        storage = Storage(str(tmp_path))
        sender = Sender(lambda: Tracker(store, "behind a proxy", place), storage, "large", "e")
        texts = {"a.txt": "a", "changes.diff": "x" * 2000, "config.json": "{}"}
        sender.record(Record(params={"seed": "1"}, texts=texts, tags={"preset": "e"}))
        sender.record(Record(metrics={"loss": 1.0}, status="FINISHED"))
        unsent = sender.close(30)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (0, 1)
    assert "413" in str(unsent)
    assert {"a.txt", "config.json"} == set(taken)
    tracker = Tracker(store, "behind a proxy")
    run_id = tracker.find_run("large")
    assert run_id is not None
    run = tracker.client.get_run(run_id)
    assert (run.data.params, run.data.metrics, run.info.status) == ({"seed": "1"}, {"loss": 1.0}, "FINISHED")


@pytest.mark.parametrize("status", [403, 406])
def test_a_firewall_that_dislikes_what_is_in_a_text_holds_up_nothing_else(
    store: str, tmp_path: Path, status: int
) -> None:
    """It answers as a login without rights is answered, but takes other files by the same login."""
    taken: dict[str, bytes] = {}
    away = [True]

    def answered(method: str, path: str, body: bytes) -> Answer:
        if b"/etc/passwd" in body or (b"later" in body and away and away.pop()):
            return status, "<h1>Forbidden by the rules of your company</h1>"
        taken[path.rpartition("/")[2]] = body
        return 200, "{}"

    identity = f"firewall {status}"
    with server(answered) as uri:
        place = f"{uri}/api/2.0/mlflow-artifacts/artifacts/x"
        storage = Storage(str(tmp_path))
        sender = Sender(lambda: Tracker(store, f"behind a firewall {status}", place), storage, identity, "e")
        texts = {"a.txt": "a", "changes.diff": "+ /etc/passwd", "config.json": "{}"}
        sender.record(Record(params={"seed": "1"}, texts=texts))
        sender.record(Record(metrics={"loss": 1.0}, texts={"b.txt": "later"}, status="FINISHED"))
        unsent = sender.close(30)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (0, 1)
    assert str(status) in str(unsent)
    assert {"a.txt": b"a", "config.json": b"{}", "b.txt": b"later"}.items() <= taken.items()
    assert "changes.diff" not in taken
    tracker = Tracker(store, f"behind a firewall {status}")
    run = tracker.client.get_run(str(tracker.find_run(identity)))
    assert (run.data.params, run.data.metrics, run.info.status) == ({"seed": "1"}, {"loss": 1.0}, "FINISHED")


def test_a_firewall_before_the_server_that_dislikes_a_tag_holds_up_no_other(tmp_path: Path) -> None:
    sent: list[bytes] = []

    def answered(method: str, path: str, body: bytes) -> Answer:
        if b"etc/passwd" in body:
            return 403, "<h1>Forbidden</h1>"
        if path.endswith("log-batch"):
            sent.append(body)
        run = {"info": {"run_id": "1", "status": "RUNNING", "experiment_id": "1"}, "data": {}}
        answer = {"runs/search": {"runs": [run]}, "runs/get": {"run": run}, "get-by-name": json.loads(EXPERIMENT)}
        return 200, json.dumps(next((found for name, found in answer.items() if name in path), {}))

    with server(answered) as uri:
        sender = Sender(lambda: Tracker(uri, "e"), Storage(str(tmp_path)), "tags", "e")
        sender.record(Record(tags={"command": "cat /etc/passwd", "preset": "e"}))
        sender.record(Record(metrics={"loss": 1.0}))
        unsent = sender.close(30)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (0, 1)
    assert any(b"preset" in body for body in sent)
    assert any(b"loss" in body for body in sent)


def test_a_store_of_artifacts_that_is_down_has_refused_nothing(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries of the clouds have errors of their own, which are no OSErrors."""
    down, log_text = [True, True, True], Tracker.log_text

    def log(self: Tracker, *arguments: Any) -> None:
        if down:
            down.pop()
            raise ConnectionClosed("Could not connect to the endpoint URL")
        log_text(self, *arguments)

    monkeypatch.setattr(Tracker, "log_text", log)
    storage = Storage(str(tmp_path))
    sender = Sender(lambda: Tracker(store, "e"), storage, "down", "e")
    sender.record(Record(texts={"a.txt": "a"}))
    assert sender.close(30) is None
    assert not down
    assert not has_waiting(storage, "down")


def test_errors_of_others_are_not_those_of_a_store() -> None:
    assert is_transient(type("S3UploadFailedError", (Exception,), {"__module__": "boto3.exceptions"})())
    assert not is_transient(type("InvalidArgumentError", (Exception,), {"__module__": "tensorflow.python"})())
    assert not is_transient(FileNotFoundError())
    assert not is_transient(ValueError())
