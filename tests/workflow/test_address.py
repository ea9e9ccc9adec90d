"""The address of the cluster to join, and what a person is told when none can be joined there."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import self_signed, with_a_password

from pipeline.workflow import address as cluster_address
from pipeline.workflow.address import CERTIFICATES, HTTP2_PREFACE, address_to_join

SETTINGS_FRAME = b"\0\0\0\x04\0\0\0\0\0"


@contextlib.contextmanager
def server(answer: bytes | None, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Address of a server that sends `answer` to each connection, as a gRPC server does; None: it says nothing."""
    held: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                if tls is not None:
                    try:
                        connection = tls.wrap_socket(connection, server_side=True)
                    except OSError:
                        connection.close()
                        continue
                held.append(connection)
                if answer is not None:
                    connection.recv(len(HTTP2_PREFACE))
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def test_what_a_killed_cluster_left_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with server(SETTINGS_FRAME) as address:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert address_to_join() == address
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        assert address_to_join() == address
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert address_to_join() is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert address_to_join() is None


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "HTTP/1"])
def test_a_port_of_another_program_is_no_cluster(
    answer: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_address, "ANSWER_SECONDS", 0.5)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with server(answer) as address:
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert address_to_join() is None, "its port was given to another program since"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"RAY_ADDRESS = {address}: no cluster answers: start it, or unset"):
            address_to_join()


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head"])
def test_an_address_of_another_kind_is_refused_with_the_remedy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=r"HOST:PORT of the head: take `ray submit` or `ray job submit`, or unset"):
        address_to_join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"), "127.0.0.1")


def asks_for(certificate: Path) -> ssl.SSLContext:
    """TLS of a server that, like Ray, lets only those in that show a certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    tls.load_verify_locations(certificate)
    tls.verify_mode = ssl.CERT_REQUIRED
    return tls


def test_a_cluster_with_tls_is_found(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(SETTINGS_FRAME, asks_for(certificate)) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        for name in ("RAY_USE_TLS", *CERTIFICATES):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match="if it is a cluster with TLS, set RAY_USE_TLS = 1"):
            address_to_join()
        monkeypatch.setenv("RAY_USE_TLS", "1")
        with pytest.raises(ValueError, match=r"but its certificates cannot be read .*mend RAY_TLS_CA_CERT = ,"):
            address_to_join()
        for missing in CERTIFICATES:
            for name in CERTIFICATES:
                monkeypatch.setenv(name, "" if name == missing else str(certificate))
            with pytest.raises(ValueError, match=rf"cannot be read \(Ray needs all three\): mend .*{missing} = ,"):
                address_to_join()
        for name in CERTIFICATES:
            monkeypatch.setenv(name, str(certificate))
        assert address_to_join() == address


def test_a_cluster_with_tls_that_was_started_here_is_not_passed_over(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    for name in CERTIFICATES:
        monkeypatch.setenv(name, str(certificate))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    file = tmp_path / "ray" / "ray_current_cluster"
    with server(SETTINGS_FRAME, asks_for(certificate)) as address:
        file.write_text(address)
        with pytest.raises(
            ValueError,
            match=rf"{file} names a cluster at {address}: .* set RAY_USE_TLS = 1 .* or set RAY_ADDRESS = local",
        ):
            address_to_join()
        monkeypatch.setenv("RAY_USE_TLS", "1")
        assert address_to_join() == address
    assert address_to_join() is None, "it has ended"


def test_other_certificates_than_those_of_the_cluster_are_named(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = self_signed(tmp_path, "127.0.0.1")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    for name in CERTIFICATES:
        monkeypatch.setenv(name, str(other))
    with server(SETTINGS_FRAME, asks_for(certificate)) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=r"TLS of RAY_USE_TLS = 1 \(.*\): give the certificates of"):
            address_to_join()
    with server(SETTINGS_FRAME) as address:  # a cluster without TLS
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=r"TLS .* unset RAY_USE_TLS if it has none, or unset"):
            address_to_join()


def test_a_key_with_a_password_is_named_and_nobody_is_asked(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = with_a_password(certificate, tmp_path / "key.pem")
    for name in CERTIFICATES:
        monkeypatch.setenv(name, str(file if name.endswith("KEY") else certificate))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"its certificates cannot be read .*RAY_TLS_SERVER_KEY = {file}"):
        address_to_join()
