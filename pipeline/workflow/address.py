"""Finds the Ray cluster to join, and asks whether it answers: Ray itself would keep trying for minutes."""

import os
import re
import socket
import ssl
import stat
import tempfile
import time
from pathlib import Path

ANSWER_SECONDS = 5.0
STOP_SECONDS = 1.0
"""After which a cluster that was about to stop, and so ended a connection, answers no more."""
HTTP2_SETTINGS = b"\x04"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + HTTP2_SETTINGS + b"\0\0\0\0\0"
TLS_ALERT = b"\x15"
NO_CLUSTER = "no cluster answers: start it"
CERTIFICATES = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")


def address_to_join() -> str | None:
    """Address of the cluster to join: `$RAY_ADDRESS`, or that of a `ray start` of this user or of root on this
    machine if it answers.

    Raises:
        ValueError: if `$RAY_ADDRESS` is no address that a driver can join, if no cluster answers there, or if what
            answers at either address does not agree to the TLS of this process.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        return _started_here() or address or None
    if address == "local":
        return None
    if not re.fullmatch(r"[^/]+:[0-9]+", address):
        raise ValueError(
            f"RAY_ADDRESS = {address}: a run is started on the cluster, where the address is HOST:PORT of the head: "
            "take `ray submit` or `ray job submit`, or unset RAY_ADDRESS"
        )
    if fault := _fault(address):
        raise ValueError(f"RAY_ADDRESS = {address}: {fault}, or unset RAY_ADDRESS")
    return address


def _started_here() -> str | None:
    """Address of the cluster that `ray start` of this user or of root has started on this machine, if it answers.

    A run that silently went on without a cluster with TLS would not use its nodes, so that is an error.
    """
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    address = _own_text(file)
    fault = _fault(address) if address else NO_CLUSTER
    if address and fault not in (None, NO_CLUSTER):
        time.sleep(STOP_SECONDS)
        fault = _fault(address)
    if fault in (None, NO_CLUSTER):
        return None if fault else address
    raise ValueError(
        f"{file} names a cluster at {address}: {fault}, or set RAY_ADDRESS = local for a run without that cluster"
    )


def _own_text(path: Path) -> str | None:
    """The text of a file that this user or root has written; None of another: Ray lets all users write its folder."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), errors="replace") as file:
            status = os.fstat(file.fileno())
            is_own = stat.S_ISREG(status.st_mode) and status.st_uid in (os.getuid(), 0)
            return file.read(1000).strip() if is_own else None
    except OSError:
        return None


def _fault(address: str) -> str | None:
    """Why no cluster can be joined at `host:port`, with the remedy; None if a gRPC server answers."""
    host, _, port = address.rpartition(":")
    expected = os.environ.get("RAY_USE_TLS", "")
    try:
        tls = _tls() if expected.lower() in ("1", "true") else None
    except (OSError, ValueError) as error:
        given = ", ".join(f"{name} = {os.environ.get(name, '')}" for name in CERTIFICATES)
        return f"RAY_USE_TLS = {expected}, but its certificates cannot be read ({error}): mend {given}"
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS)
        with connection if tls is None else tls.wrap_socket(connection) as stream:
            stream.sendall(HTTP2_PREFACE)
            answer = stream.recv(9)
    except ssl.SSLError as error:
        return (
            f"what answers does not agree to the TLS of RAY_USE_TLS = {expected} ({error.reason or error}): give the "
            f"certificates of the cluster in {', '.join(CERTIFICATES)}, unset RAY_USE_TLS if it has none"
        )
    except ConnectionResetError:
        answer = b""
    except (OSError, ValueError, OverflowError):
        return NO_CLUSTER
    if answer[:1] in (b"", TLS_ALERT) and tls is None:
        return "what answers ends the connection: if it is a cluster with TLS, set RAY_USE_TLS = 1 and its certificates"
    # The first frame of an HTTP/2 server is its settings; the byte after the length of a frame is its type.
    return None if answer[3:4] == HTTP2_SETTINGS else NO_CLUSTER


def _tls() -> ssl.SSLContext:
    """What Ray does with TLS: both sides show the same kind of certificate, and the name in it is the address."""
    authority, certificate, key = (os.environ.get(name) for name in CERTIFICATES)
    if not (authority and certificate and key):
        raise ValueError("Ray needs all three")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False  # gRPC accepts other names than Python does; Ray reports a wrong one itself
    made.load_verify_locations(authority)
    made.load_cert_chain(certificate, key, password="")  # without one, OpenSSL asks the terminal for that of a key
    made.set_alpn_protocols(["h2"])
    return made
