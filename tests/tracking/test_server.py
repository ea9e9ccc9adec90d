"""Whether a tracking store answers: servers with a login or a certificate of their own, databases, and what is none."""

import base64
import contextlib
import http.server
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from pipeline.registry.fetch import resolve
from pipeline.storage import Storage
from pipeline.tracking.artifacts import check_artifacts
from pipeline.tracking.config import HOST_REFUSED
from pipeline.tracking.errors import check_login, retry_transient
from pipeline.tracking.outbox import Record
from pipeline.tracking.sender import Sender
from pipeline.tracking.server import check_server, has_database
from pipeline.tracking.tracker import Tracker, open_client

LOGIN = "us er:p@ss"


@contextlib.contextmanager
def tracking_server(
    login: str | None, answer: bytes = b'{"experiments": []}', status: int = 200, seconds: float = 0
) -> Iterator[str]:
    """Host and port of a server that answers the one request, to whoever has the login, after `seconds`."""
    expected = login and f"Basic {base64.b64encode(login.encode()).decode()}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(seconds)
            right = expected is None or self.headers["Authorization"] == expected
            wanted = self.path == "/mlflow/api/2.0/mlflow/experiments/search?max_results=1"
            self.send_response(401 if not right else status if wanted else 404)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_login_in_the_address_is_sent_as_mlflow_does() -> None:
    with tracking_server(LOGIN) as host:
        check_server(f"http://us%20er:p%40ss@{host}/mlflow/")
        check_server(f"http://{host}/mlflow")  # MLflow may have the login from its variables
        with pytest.raises(ValueError, match=r"the server refuses the login .*401.*MLFLOW_TRACKING_USERNAME"):
            check_server(f"http://user:wrong@{host}/mlflow")
    with tracking_server(None) as host:
        check_server(f"http://user:unasked@{host}/mlflow")
        with pytest.raises(ValueError, match=r"no MLflow server answers .*404"):
            check_server(f"http://{host}")


def test_a_server_that_answers_late_is_one() -> None:
    """As on a machine with much other work."""
    with tracking_server(None, seconds=2.5) as host:
        check_server(f"http://{host}/mlflow")


@pytest.fixture
def wrong_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheimnis")


@pytest.mark.usefixtures("wrong_login")
def test_a_wrong_login_from_the_variables_is_refused_at_once() -> None:
    start = time.monotonic()
    # As `mlflow server --app-name basic-auth` says it; here with what was sent.
    with tracking_server(LOGIN, b"You are not authenticated as user:geheimnis.") as host:
        uri = f"http://other:zweites@{host}/mlflow"
        calls: tuple[Callable[[], object], ...] = (
            lambda: check_artifacts(f"http://{host}/mlflow", "e", None),
            lambda: retry_transient(lambda: Tracker(f"http://{host}/mlflow", "e"), f"http://{host}/mlflow", 600),
            lambda: retry_transient(lambda: open_client(uri).get_registered_model("m"), uri, 600),
        )
        for call in calls:
            with pytest.raises(
                ValueError, match=r"tracking.uri = .* refuses the login.*401.*authenticated.*MLFLOW_TRACKING_USERNAME"
            ) as raised:
                call()
            assert "geheimnis" not in str(raised.value)
            assert "zweites" not in str(raised.value)
    assert time.monotonic() - start < 10


def test_a_login_that_is_refused_is_no_reason_to_set_records_aside(tmp_path: Path) -> None:
    """They can be sent with the next one."""
    with tracking_server(LOGIN, b"You are not authenticated.") as host:
        sender = Sender(lambda: Tracker(f"http://{host}/mlflow", "e"), Storage(str(tmp_path)), "login", "e")
        sender.record(Record("train", metrics={"loss": 1.0}))
        unsent = sender.close(2)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (1, 0)
    assert "the server refuses the login" in str(unsent)


@pytest.mark.parametrize(
    ("answer", "what"), [(b"\n<!doctype html><p>Please log in", "a web page, such as a form"), (b"", "no JSON")]
)
def test_what_answers_but_is_no_server_of_mlflow_is_refused(answer: bytes, what: str) -> None:
    with (
        tracking_server(None, answer) as host,
        pytest.raises(ValueError, match=rf"no MLflow server answers, for {host} has sent {what}.*: give the address"),
    ):
        check_server(f"http://user:geheimnis@{host}/mlflow")


def test_a_server_that_does_not_know_its_name_is_told_it() -> None:
    from mlflow.server.security_utils import INVALID_HOST_MSG

    assert HOST_REFUSED in INVALID_HOST_MSG, "MLflow says it in other words: tracking/config.py"
    remedy = "refuses requests to this host .*: start it with --allowed-hosts"
    with tracking_server(None, INVALID_HOST_MSG.encode(), 403) as host, pytest.raises(ValueError, match=remedy):
        check_server(f"http://{host}/mlflow")
    error = MlflowException(INVALID_HOST_MSG, error_code=PERMISSION_DENIED)
    with pytest.raises(ValueError, match=remedy):
        check_login(error, "http://server:5000")


def test_a_server_that_a_proxy_hides_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with tracking_server(None) as host:
        with pytest.raises(ValueError, match=r"asked through the proxy of http_proxy, so add 127\.0\.0\.1 to no_proxy"):
            check_server(f"http://{host}/mlflow")
        for near in ("127.0.0.1", "10.0.0.0/8,127.0.0.0/8"):  # a network too, as MLflow's client reads it
            monkeypatch.setenv("no_proxy", near)
            check_server(f"http://{host}/mlflow")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql+nope://host/db", "no URI of a database that SQLAlchemy knows"),
        ("mysql+mysqldb://host/db", r"driver of the database is not installed \(No module named 'MySQLdb'\): install"),
        ("postgresql+psycopg2://mlflow@127.0.0.1:9/db", "the database does not answer .*refused"),
        ("postgresql+psycopg2://mlflow@127.0.0.1:port/db", "no URI of a database"),
    ],
)
def test_a_database_is_asked_before_anything_starts(uri: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"tracking.uri = .*{message}"):
        check_server(uri)
    assert time.monotonic() - start < 10


def test_an_sqlite_file_need_not_exist(tmp_path: Path) -> None:
    check_server(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_an_sqlite_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("This is no database, although it is long enough for the header of one. " * 3)
    (tmp_path / "folder").mkdir()
    for place in ("text", "folder", "text/below.db"):
        with pytest.raises(ValueError, match=rf"{place}: cannot be read and written as an SQLite database \(.*give an"):
            check_server(f"sqlite:///{tmp_path}/{place}")
    for uri in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ValueError, match="keeps nothing when the run has ended"):
            check_server(uri)
    with pytest.raises(ValueError, match="cannot be read and written"):
        check_server("sqlite:////proc/mlflow.db")


def test_an_sqlite_file_in_which_another_process_writes_is_one(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("CREATE TABLE runs (id)")
        other.execute("BEGIN EXCLUSIVE")
        check_server(f"sqlite:///{tmp_path}/mlflow.db")
    check_server(f"sqlite:///{tmp_path}/mlflow.db")


def test_databricks_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABRICKS_HOST", raising=False)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))
    with pytest.raises(ValueError, match="databricks: there is no login: set DATABRICKS_HOST"):
        check_server("databricks")
    (tmp_path / "databrickscfg").write_text("[DEFAULT]\nhost = https://h\n")
    check_server("databricks")


def test_a_registry_is_not_made_in_the_database_of_another_program(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE mine (id)")
        other.commit()
    uri = f"sqlite:///{tmp_path}/other.db"
    assert not has_database(uri)
    with pytest.raises(ValueError, match=r"other.db is no database of MLflow: give --tracking-uri"):
        resolve("models:/m/1", uri)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
        other.execute("CREATE TABLE registered_models (id)")
        other.commit()
    assert has_database(uri)
    assert has_database(f"{uri}?timeout=5")
    assert not has_database(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("uri", ["nonsense", "/tmp", "ftp://host/x", ""])
def test_what_is_no_store_is_named(uri: str) -> None:
    for call in (lambda: resolve("models:/m/1", uri), lambda: open_client(uri)):
        with pytest.raises(ValueError, match=r"tracking.uri = .*(: give http://HOST:PORT, sqlite:///FILE|SQLAlchemy)"):
            call()
