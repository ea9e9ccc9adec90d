"""A file system that is mounted and never answers, as that of a network folder whose server is gone.

The kernel does not let go of a process that asks it, even if that is killed.
"""

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_INIT, _FORCE, _DETACH = 26, 1, 2


@contextlib.contextmanager
def dead_mount(folder: Path) -> Iterator[Path]:
    """Mounts it at `folder`, which is made; within the block nobody who asks it gets an answer."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"there is no FUSE here: {error}")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"dead", os.fsencode(folder), b"fuse", 0, options):
        os.close(device)
        pytest.skip(f"FUSE cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    reader = threading.Thread(target=_read_and_be_silent, args=(device,), daemon=True)
    reader.start()
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), _FORCE | _DETACH)  # lets everybody go who waits
        reader.join(10)
        os.close(device)


def _read_and_be_silent(device: int) -> None:
    """Takes the requests of the kernel, and answers the one alone that every mount begins with."""
    with contextlib.suppress(OSError):  # the mount is gone
        while True:
            request = os.read(device, 1 << 17)
            _, operation, number = struct.unpack_from("IIQ", request)
            if operation == _INIT:
                body = struct.pack("4I2H2I2H8I", 7, 31, 0, 0, 0, 0, 4096, 0, 0, 0, *[0] * 8)
                os.write(device, struct.pack("IiQ", 16 + len(body), 0, number) + body)
