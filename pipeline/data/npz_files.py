"""Reads npz files that strangers have made: the headers first, no array but those that are meant, a few rows at a time.

NumPy's own `load` reads whole arrays, and a file of some megabytes may claim, or even hold, gigabytes.
"""

import contextlib
import io
import itertools
import math
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from pipeline.data.excerpt import excerpt
from pipeline.data.parquet_files import FEW_ROWS
from pipeline.storage import Storage

_HEADER_BYTES = 10_000
_FORTRAN = " in Fortran order: save np.ascontiguousarray of it"
_END_BYTES = 1 << 17
"""Bytes at the end of a zip file among which its end record is."""
_DIRECTORY_BYTES = 1 << 20
_LARGEST_LABEL = 4000
"""Bytes of a label, which are four for each character."""


class NpzImages:
    """The array `images` of an npz file, uint8 (N, H, W) or (N, H, W, C), and arrays that have a value for each image.

    Args:
        root: Storage of the file.
        file: Its path.

    Raises:
        ValueError: if it has no such array, or cannot be read; names the file.
    """

    def __init__(self, root: Storage, file: str) -> None:
        self._name = root.absolute(file)
        with self._errors():
            self._source = root.filesystem.open_input_file(root.fs_path(file))
        self._stream: zipfile.ZipExtFile | None = None
        self._row = 0
        try:
            size = self._source.size()
            with self._errors():
                self._check_directory(size)
                self._zip = zipfile.ZipFile(self._source)
                self.arrays = sorted(name.removesuffix(".npy") for name in self._zip.namelist())
                for name, after in itertools.pairwise(self.arrays):
                    if name == after:
                        raise ValueError(f"{self._name} has two arrays `{excerpt(name)}`: write it again")
                if "images" not in self.arrays:
                    raise ValueError(f"{self._name} has no array `images`, but {excerpt(self.arrays)}")
                self.shape, dtype, self._first_byte = self._header("images")
            if (
                dtype != np.uint8
                or len(self.shape) not in (3, 4)
                or not all(self.shape[1:])
                or (len(self.shape) == 4 and self.shape[3] not in (1, 3))
            ):
                raise ValueError(
                    f"{self._name}: expected images uint8 (N, H, W) or (N, H, W, C) with C of 1 or 3, found {dtype} "
                    f"{self.shape}"
                )
            self._check_size("images", self.shape, dtype, self._first_byte)
            if self.shape[0] > max(FEW_ROWS, size):
                raise ValueError(f"{self._name} claims {self.shape[0]:,} images in {size:,} bytes: write it again")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "NpzImages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def rows(self, start: int, count: int) -> Iterator[np.ndarray]:
        """Images from `start`, `count` of them, each (H, W[, C]). Rows in order are read without going back.

        Raises:
            ValueError: if the file cannot be read, or has fewer.
        """
        row_bytes = math.prod(self.shape[1:])
        with self._errors():
            if self._stream is None or start < self._row:
                self._stream = self._open("images")
                self._row = 0
                self._stream.seek(self._first_byte)
            self._stream.seek(self._stream.tell() + (start - self._row) * row_bytes)
            self._row = start
            for _ in range(count):
                data = self._stream.read(row_bytes)
                if len(data) != row_bytes:
                    raise ValueError(f"{self._name} ends within the image {self._row}: write it again")
                self._row += 1
                yield np.frombuffer(data, np.uint8).reshape(self.shape[1:])

    def values(self, array: str, kinds: str, length: int | None = None) -> np.ndarray:
        """An array of one dimension.

        Args:
            array: Its name.
            kinds: Accepted kinds of its type, as NumPy's letters.
            length: Number of its values; None: as many as there are images.

        Raises:
            ValueError: if it is not there, or of another type or length.
        """
        with self._errors():
            if array not in self.arrays:
                raise ValueError(f"{self._name} has no array `{array}`, but {excerpt(self.arrays)}")
            shape, dtype, first_byte = self._header(array)
            expected = self.shape[0] if length is None else length
            is_long = dtype.itemsize > _LARGEST_LABEL
            if len(shape) != 1 or dtype.kind not in kinds or is_long or (length is None and shape[0] != expected):
                raise ValueError(
                    f"{self._name}: expected {expected} {array}, {' or '.join(_KINDS[kind] for kind in kinds)}, found "
                    f"{excerpt(dtype)} {shape}"
                )
            if length is not None and shape[0] > length:
                raise ValueError(f"{self._name}: {array} has {shape[0]:,} values, more than {length:,}")
            self._check_size(array, shape, dtype, first_byte)
            with self._open(array) as stream:
                stream.seek(first_byte)
                data = stream.read(shape[0] * dtype.itemsize)
        if len(data) != shape[0] * dtype.itemsize:
            raise ValueError(f"{self._name}: {array} ends early: write it again")
        values = np.frombuffer(data, dtype)
        if dtype.kind == "U" and not _is_text(values):
            raise ValueError(f"{self._name}: {array} has characters that are none: write it again")
        return values

    def _check_directory(self, size: int) -> None:
        """Refuses a list of members that is too long to be meant, of which `zipfile` would make an object for each."""
        start = max(0, size - _END_BYTES)
        end = self._source.read_at(size - start, start)
        position = end.rfind(b"PK\5\6")
        found = int.from_bytes(end[position + 12 : position + 16], "little") if position >= 0 else 0
        large = end.rfind(b"PK\6\6")
        if found == 0xFFFFFFFF and large >= 0:  # of a file with more than 4 GiB
            found = int.from_bytes(end[large + 40 : large + 48], "little")
        if found > _DIRECTORY_BYTES:
            raise ValueError(f"{self._name} lists its arrays in {found:,} bytes: write it with fewer")

    def _open(self, array: str) -> zipfile.ZipExtFile:
        opened = self._zip.open(f"{array}.npy")
        assert isinstance(opened, zipfile.ZipExtFile)
        return opened

    def _header(self, array: str) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape, type and position of the first byte of an array."""
        with self._open(array) as stream:
            head = io.BytesIO(stream.read(_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(head)
        if any(size < 0 for size in shape) or dtype.hasobject or (is_fortran and len(shape) > 1):
            raise ValueError(f"{array} is {excerpt(dtype)} {shape}{_FORTRAN * is_fortran}")
        return shape, dtype, head.tell()

    def _check_size(self, array: str, shape: tuple[int, ...], dtype: np.dtype, first_byte: int) -> None:
        expected, found = first_byte + math.prod(shape) * dtype.itemsize, self._zip.getinfo(f"{array}.npy").file_size
        if expected != found:
            raise ValueError(f"{self._name}: {array} must have {expected:,} bytes, and has {found:,}: write it again")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Names the file in what a damaged one raises."""
        try:
            yield
        except ValueError as error:
            if str(error).startswith(self._name):
                raise
            raise ValueError(f"{self._name} cannot be read: {excerpt(error)}") from error
        # NumPy parses a header as Python. zipfile raises the others: RuntimeError for an encrypted file, and a subclass
        # of it for an unknown compression.
        except (
            zipfile.BadZipFile, zlib.error, OSError, EOFError, SyntaxError, TypeError, KeyError, RuntimeError,
            MemoryError, OverflowError,
        ) as error:  # fmt: skip
            raise ValueError(f"{self._name} cannot be read: {excerpt(error)}") from error


def _is_text(values: np.ndarray) -> bool:
    """Whether an array of text has no numbers that are no characters."""
    points = values.view(values.dtype.byteorder + "u4")
    return not ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any()


_KINDS = {"i": "integers", "u": "integers without sign", "U": "text"}
