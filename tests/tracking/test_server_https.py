"""What stands before a tracking server: certificates of one's own, and proxies that send clients elsewhere."""

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import self_signed, with_a_password

from pipeline.tracking import server
from pipeline.tracking.server import check_server


@contextlib.contextmanager
def web_server(
    tls: ssl.SSLContext | None = None, to: str = "", code: int = 0, logins: list[str | None] | None = None
) -> Iterator[str]:
    """Host and port of a server that answers as MLflow does, or sends clients `to` another one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if logins is not None:
                logins.append(self.headers["Authorization"])
            self.send_response(code or 200)
            if to:
                self.send_header("Location", to + self.path)
            self.end_headers()
            self.wfile.write(b'{"experiments": []}')

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that does not accept the certificate

    with Server(("127.0.0.1", 0), Handler) as made:
        if tls is not None:
            made.socket = tls.wrap_socket(made.socket, server_side=True)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(autouse=True)
def no_certificates_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ANSWER_SECONDS", 20.0)
    for name in (*server._CERTIFICATES, server._CLIENT_CERTIFICATE, "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_an_authority_that_only_the_system_knows_is_refused_as_by_mlflow(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client does not look there: the run would be recorded nowhere."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with web_server(tls) as host:
        with pytest.raises(ValueError, match=r"is not accepted .*verify failed.*set MLFLOW_TRACKING_SERVER_CERT_PATH"):
            check_server(f"https://{host}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
        with pytest.raises(ValueError, match=r"REQUESTS_CA_BUNDLE = /nowhere.pem cannot be read as certificates"):
            check_server(f"https://{host}")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        check_server(f"https://{host}")


def test_a_certificate_of_the_client_is_shown(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(certificate)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    with web_server(tls) as host:
        with pytest.raises(ValueError, match="no MLflow server answers"):
            check_server(f"https://{host}")
        monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(certificate))
        check_server(f"https://{host}")
        file = with_a_password(certificate, tmp_path / "encrypted.pem")
        monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(file))
        with pytest.raises(
            ValueError, match=f"MLFLOW_TRACKING_CLIENT_CERT_PATH = {file} cannot be read as certificates"
        ):
            check_server(f"https://{host}")


def test_certificates_are_not_the_matter_of_a_server_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    with web_server() as host:
        check_server(f"http://{host}")


@pytest.mark.parametrize("code", [301, 302, 303])
def test_a_server_that_has_moved_is_refused_with_its_new_address(code: int) -> None:
    """By such a redirect, as from http to https, a client asks with GET for what it would have sent with POST."""
    with (
        web_server() as new,
        web_server(to=f"http://{new}", code=code) as old,
        pytest.raises(ValueError, match=rf"the server has moved to http://{new}/mlflow, .*: give http://{new}/mlflow"),
    ):
        check_server(f"http://{old}/mlflow")


def test_a_redirect_takes_no_login_to_another_host() -> None:
    logins: list[str | None] = []
    with web_server(logins=logins) as new, web_server(to=f"http://{new}", code=307) as old:
        check_server(f"http://user:geheimnis@{old}")
    assert logins == [None]
