"""Reads the Python 2 pickles of a CIFAR archive without running any of it.

To unpickle is to execute what the pickle says; this unpickler knows three names of numpy and no other.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Collection
from typing import Any, ClassVar

import numpy as np

_MAX_MEMBER_BYTES = 256 * 2**20
"""More than any member of the official archives has (155 MB), and less than would fill the memory."""


def read_pickles(data: bytes, names: Collection[str]) -> dict[str, dict[bytes, Any]]:
    """Unpickles members of a `.tar.gz`, wherever they lie in it; nothing touches the disk.

    Args:
        data: the archive.
        names: names of the members, without folders.

    Returns:
        The dict that each member holds, with Python 2's strings as bytes.

    Raises:
        ValueError: if the archive is cut off or lacks a member, or if a member asks for anything but dicts, lists,
            strings, numbers and numpy arrays.
    """
    contents: dict[str, dict[bytes, Any]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                if member.size > _MAX_MEMBER_BYTES:
                    raise ValueError(f"{member.name}: expected at most {_MAX_MEMBER_BYTES} bytes, found {member.size}")
                name = member.name.rpartition("/")[2]
                if name in names and (file := archive.extractfile(member)) is not None:
                    contents[name] = _unpickle(file.read(), name)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"expected a whole .tar.gz, found {len(data)} bytes that are none: {error}") from error
    if missing := sorted(set(names) - contents.keys()):
        raise ValueError(f"expected the members {sorted(names)}, found none called {missing}")
    return contents


class _ArrayUnpickler(pickle.Unpickler):
    # numpy has moved its private `_reconstruct`; an array's own reduction gives it under any version.
    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no official archive needs") from None


def _unpickle(data: bytes, name: str) -> dict[bytes, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # A malformed pickle raises anything: IndexError, AttributeError, MemoryError.
        raise ValueError(f"{name}: this pickle is not loaded: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a pickled dict, found {type(content).__name__}")
    return content
