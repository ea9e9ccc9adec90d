"""The kernel drops what comes to a filtered port from other addresses; connections of before end too."""

import os
import socket
import time

import pytest

from pipeline.workers.port_filter import PortGuard, restrict

STRANGER = "127.0.0.2"  # an address of the loopback from which the workers of one host do not speak
SECONDS = 0.5


def listen(address: str = "0.0.0.0") -> socket.socket:
    if ":" not in address:
        return socket.create_server((address, 0))
    return socket.create_server((address, 0), family=socket.AF_INET6, dualstack_ipv6=True)  # as gRPC does


def connect(server: socket.socket, source: str, target: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((target, server.getsockname()[1]), SECONDS, (source, 0))


@pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
def test_only_the_named_addresses_are_let_in(bound: str) -> None:
    with listen(bound) as server, listen(bound) as other:
        connect(server, STRANGER).close()  # so is the port without a filter
        assert restrict(server.getsockname()[1], ["192.0.2.1", "127.0.0.1"])
        with connect(server, "127.0.0.1") as peer:
            server.accept()[0].close()  # that of the stranger
            accepted, _ = server.accept()
            with accepted:
                peer.sendall(b"gradients")
                assert accepted.recv(9) == b"gradients"
        with pytest.raises(TimeoutError):
            connect(server, STRANGER)
        connect(other, STRANGER).close()  # a port that is not meant


def test_addresses_of_version_6() -> None:
    with listen("::") as server:
        port = server.getsockname()[1]
        assert restrict(port, ["::1", "fe80::1%eth0", "127.0.0.1"])
        socket.create_connection(("::1", port), SECONDS).close()
        connect(server, "127.0.0.1").close()
        assert restrict(port, ["::2", "192.0.2.1"])
        for address in ("::1", "127.0.0.1"):
            with pytest.raises(TimeoutError):
                socket.create_connection((address, port), SECONDS)


def test_a_guard_waits_until_the_port_listens() -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        guard = PortGuard(server.getsockname()[1], ["127.0.0.1"])
        guard.start()
        time.sleep(0.05)
        assert guard.is_alive()
        server.listen()
        guard.check(5)
        with pytest.raises(TimeoutError):
            connect(server, STRANGER)
        connect(server, "127.0.0.1").close()


def test_connections_of_before_are_cut() -> None:
    with listen() as server, connect(server, STRANGER) as stranger:
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(SECONDS)
            stranger.sendall(b"?")
            assert accepted.recv(1) == b"?"
            guard = PortGuard(server.getsockname()[1], ["127.0.0.1"])
            guard.start()
            guard.check(5)
            stranger.sendall(b"read /etc/passwd")
            with pytest.raises(TimeoutError):
                accepted.recv(1)


def test_a_guard_of_a_port_that_never_listens_says_so() -> None:
    with listen() as server:
        port = server.getsockname()[1]
    guard = PortGuard(port, ["127.0.0.1"])
    guard.start()
    with pytest.raises(TimeoutError, match=f"nothing listens on port {port}"):
        guard.check(0.1)
    guard.join(5)
    assert not guard.is_alive()


def test_looking_at_the_sockets_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    restrict(1, ["127.0.0.1"])
    assert os.listdir("/proc/self/fd") == before
