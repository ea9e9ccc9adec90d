"""Reads the Python 2 pickles of a CIFAR archive without running any of it.

To unpickle is to execute what the pickle says; this unpickler knows three names of NumPy, and hands out stand-ins for
them that take bytes and do nothing.
"""

import gzip
import io
import math
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import numpy as np

from pipeline.data.bounded_tar import BoundedTarInfo
from pipeline.data.excerpt import excerpt

MAX_ARCHIVE_BYTES = 512 * 2**20
"""Unpacked; the official archives have 186 MB."""
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
        with tarfile.open(fileobj=_Bounded(data), mode="r:", tarinfo=BoundedTarInfo) as archive:
            for member in archive:
                if member.size > _MAX_MEMBER_BYTES:
                    raise ValueError(
                        f"{excerpt(member.name)}: expected at most {_MAX_MEMBER_BYTES} bytes, found {member.size}"
                    )
                name = member.name.rpartition("/")[2]
                # A link would be followed, to a member that is perhaps not there.
                if name in names and member.isreg() and (file := archive.extractfile(member)) is not None:
                    contents[name] = _unpickle(file.read(), name)
    # Nested headers end in a RecursionError, sizes that are none in an OverflowError.
    except (tarfile.TarError, EOFError, OSError, zlib.error, RecursionError, OverflowError) as error:
        why = excerpt(error)
        raise ValueError(f"expected a whole .tar.gz, found {len(data)} bytes that are none: {why}") from error
    if missing := sorted(set(names) - contents.keys()):
        raise ValueError(f"expected the members {sorted(names)}, found none called {missing}")
    return contents


class _Type:
    """Stands in for `numpy.dtype`, of which an official archive has uint8 alone."""

    def __init__(self, name: object = None, *_: object) -> None:
        if name not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array is of type {excerpt(repr(name))}, and not of uint8")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, of which uint8 has none."""


class _Class:
    """Stands in for `numpy.ndarray`, which is named and never called."""

    def __init__(self, *_: object) -> None:
        raise pickle.UnpicklingError("it makes an array in another way than NumPy does")


class _Array:
    """Stands in for an array: takes a shape and as many bytes as that has, once."""

    array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(shape), _Type(), bool(is_fortran), bytes(data)) if self.array is None:
                if all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) == len(data):
                    order: Literal["F", "C"] = "F" if is_fortran else "C"
                    self.array = np.frombuffer(data, np.uint8).reshape(shape, order=order)
                    return
        raise pickle.UnpicklingError("an array has not the bytes that its shape needs")


def _reconstruct(*_: object) -> _Array:
    """Stands in for NumPy's function of this name, which makes an empty array."""
    return _Array()


class _ArrayUnpickler(pickle.Unpickler):
    """Hands out inert stand-ins: NumPy's own classes make arrays of pointers, or of any size, from a few bytes."""

    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Class,
        ("numpy", "dtype"): _Type,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            asked = excerpt(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it asks for {asked}, which no official archive needs") from None


def _check_memo(data: bytes) -> None:
    """Refuses what the unpickler would set aside memory for unseen: a place far off in its memo, or bytes not there."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError(f"it remembers a value as number {argument:,}, of {count:,}")


def _unpickle(data: bytes, name: str) -> dict[bytes, Any]:
    try:
        _check_memo(data)
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # A malformed pickle raises anything: IndexError, AttributeError, MemoryError.
        raise ValueError(f"{name}: this pickle is not loaded: {excerpt(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a pickled dict, found {type(content).__name__}")
    return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}


class _Bounded(io.RawIOBase):
    """What a gzip stream holds, up to a size."""

    def __init__(self, data: bytes) -> None:
        self._stream = gzip.GzipFile(fileobj=io.BytesIO(data))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset > MAX_ARCHIVE_BYTES:
            raise tarfile.ReadError(f"it has more than {MAX_ARCHIVE_BYTES:,} bytes")
        return self._stream.seek(offset)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_ARCHIVE_BYTES - self.tell():
            raise tarfile.ReadError(f"it has more than {MAX_ARCHIVE_BYTES:,} bytes")
        return self._stream.read(size)
