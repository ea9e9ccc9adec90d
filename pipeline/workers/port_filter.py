"""Closes the port that TensorFlow opens in a worker to everybody but the workers of its group.

TensorFlow's gRPC server listens on all addresses of a host, whatever TF_CONFIG says, and asks for no credentials:
whoever reaches it runs operations as the worker, and some operations read and write files. TensorFlow has no option for
either (`GrpcServer::Init` binds 0.0.0.0). So the kernel drops the packets of other hosts: a socket filter (man 7
socket, SO_ATTACH_FILTER) needs no privileges, and connections inherit it from the socket that accepts them. Linux only.
"""

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator

POLL_SECONDS = 0.002
"""How long a new port may be open at most before it is filtered."""
_SETTLE_SECONDS = 0.1
_SO_ATTACH_FILTER = 26  # not among the constants of the module `socket`
# Instructions of a classic BPF program (linux/filter.h), and the offset at which it sees the IP header.
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x05, 0x15, 0x06
_IP_HEADER = 0xFFF00000
_SOURCE = {4: 12, 6: 8}
"""Offset of the source address in the header of each version of IP."""
_KEEP, _DROP = 0xFFFFFFFF, 0
_Instruction = tuple[int, int, int, int]


class PortGuard(threading.Thread):
    """Restricts a port of this process to some addresses as soon as it listens.

    Args:
        port: Number of the port.
        sources: IP addresses whose packets are let through.
    """

    def __init__(self, port: int, sources: Iterable[str]) -> None:
        super().__init__(name="port guard", daemon=True)
        self._port, self._sources = port, tuple(sources)
        self._is_closed, self._is_over = threading.Event(), threading.Event()
        self._error: OSError | None = None

    def run(self) -> None:
        try:
            while not restrict(self._port, self._sources):
                if self._is_over.wait(POLL_SECONDS):
                    return
            # Connections that were accepted before; those that waited for it then have a descriptor only now.
            time.sleep(_SETTLE_SECONDS)
            restrict(self._port, self._sources)
        except OSError as error:
            self._error = error
        self._is_closed.set()

    def check(self, seconds: float) -> None:
        """Returns once the port is restricted.

        Raises:
            OSError: if it does not listen within `seconds`, or the kernel refuses the filter.
        """
        is_closed = self._is_closed.wait(seconds)
        self._is_over.set()
        if self._error:
            raise self._error
        if not is_closed:
            raise TimeoutError(f"nothing listens on port {self._port}")


def restrict(port: int, sources: Iterable[str]) -> bool:
    """Attaches a filter to each socket of this process that is bound to `port`; returns whether one of them listens.

    Args:
        port: Number of the port.
        sources: IP addresses whose packets are let through.

    Raises:
        OSError: if the kernel refuses the filter, or is none of Linux.
    """
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has none")
    instructions = _program(sources)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    listens = False
    for bound in _sockets():
        if bound.getsockname()[1] == port:
            bound.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
            listens |= bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return listens


def _sockets() -> Iterator[socket.socket]:
    """The IP sockets of this process, of whichever library."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # another thread may close it meanwhile; a duplicate stays what it is
            copy = os.dup(int(name))
            try:
                found = socket.socket(fileno=copy)
            except OSError:  # no socket
                os.close(copy)
                continue
            with found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    yield found


def _program(sources: Iterable[str]) -> list[_Instruction]:
    """A filter that keeps the packets from `sources`, and drops all others."""
    addresses = [ipaddress.ip_address(source.partition("%")[0]) for source in sources]
    of_version = {
        version: [
            instruction
            for address in addresses
            if address.version == version
            for instruction in _keep(address.packed, _IP_HEADER + _SOURCE[version])
        ]
        for version in (4, 6)
    }
    return [
        (_LOAD_BYTE, 0, 0, _IP_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 1, 0, 4),
        (_JUMP, 0, 0, len(of_version[4]) + 1),
        *of_version[4],
        (_RETURN, 0, 0, _DROP),
        *of_version[6],
        (_RETURN, 0, 0, _DROP),
    ]


def _keep(address: bytes, offset: int) -> list[_Instruction]:
    """Instructions that keep a packet with this source address, and go on with any other."""
    words = struct.unpack(f"!{len(address) // 4}I", address)
    found: list[_Instruction] = []
    for number, word in enumerate(words):
        rest = 2 * (len(words) - number - 1) + 1
        found += [(_LOAD_WORD, 0, 0, offset + 4 * number), (_JUMP_IF_EQUAL, 0, rest, word)]
    return [*found, (_RETURN, 0, 0, _KEEP)]
