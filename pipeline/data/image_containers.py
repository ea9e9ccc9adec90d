"""Images in Parquet files, WebDataset tars and npz files: their labels, and the bytes or pixels of any of them.

Nothing is unpickled. The columns of a Parquet file are accepted by their types before a value is looked at, because
Arrow runs the code of registered extension types, some of which unpickle.
"""

import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.file_tree import IMAGE_SUFFIXES, FileTree
from pipeline.data.labelled_images import Collected, SplitFiles, split_of_files
from pipeline.storage import Storage

Encoded = bytes | np.ndarray | None
"""An image file, or uint8 (H, W[, C]); None of a Parquet row without one."""
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
HEAD_BYTES = 1 << 16
"""Bytes in which the header of nearly every image file ends."""
_BATCH_ROWS = 64
_THREADS = 16
T = TypeVar("T")


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column of this type has encoded images: binary, or a struct with binary `bytes` as Hugging Face has."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def list_parquet(tree: FileTree, chosen: list[str], collected: Collected) -> list[str] | None:
    """Adds the rows of Parquet files; returns the names of the classes if the schema has them."""
    names: dict[str, list[str] | None] = {}
    for split, file in zip(split_of_files(chosen, collected), chosen, strict=True):
        with tree.root.filesystem.open_input_file(tree.root.fs_path(file)) as source:
            parquet = pq.ParquetFile(source)
            schema = parquet.schema_arrow
            image, label = (_column(schema, wanted) for wanted in (IMAGE_COLUMNS, LABEL_COLUMNS))
            if image is None or not is_encoded(schema.field(image).type):
                raise collected.fail(
                    f"{file} has no column `image` of encoded images (binary, or a struct with bytes): {schema.names}"
                )
            if label is None or not _is_label(schema.field(label).type):
                raise collected.fail(f"{file} has no column `label` of integers or text, but {schema.names}")
            names[file] = _class_names(schema, label)
            labels = parquet.read(columns=[label])[label].to_pylist()
        if None in labels:
            raise collected.fail(f"{file}: row {labels.index(None)} has no label: leave such rows out")
        for row, value in enumerate(labels):
            collected.add(split, value, f"{file}:{row}", file, row)
    different = [file for file in chosen if names[file] != names[chosen[0]]]
    if different:
        raise collected.fail(f"{different[0]} has other names of classes than {chosen[0]}: write them alike")
    return names[chosen[0]]


def _column(schema: pa.Schema, wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in schema.names), None)


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Names of a Hugging Face `ClassLabel`."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def list_tars(tree: FileTree, chosen: list[str], collected: Collected) -> None:
    """Adds the images of WebDataset tars: `key.jpg` with its class in `key.cls`, a number or a name."""
    for split, file in zip(split_of_files(chosen, collected), chosen, strict=True):
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, str | int] = {}
        # Of a local file only the headers are read; a store would be asked once for each.
        open_file = (
            tree.root.filesystem.open_input_file if tree.root.is_local else tree.root.filesystem.open_input_stream
        )
        try:
            with (
                open_file(tree.root.fs_path(file)) as source,
                tarfile.open(fileobj=source, mode="r:" if tree.root.is_local else "r|") as tar,
            ):
                for member in tar:
                    path = PurePosixPath(member.name)
                    key, _, suffix = path.name.partition(".")
                    key = str(path.parent / key)
                    if not member.isfile() or path.name.startswith("."):
                        continue
                    if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                        if key in images:
                            raise collected.fail(f"{file} has two images of the key {key}: give each a key of its own")
                        images[key] = (member.name, member.offset_data, member.size)
                    elif suffix == "cls":
                        content = tar.extractfile(member)
                        assert content is not None
                        text = content.read(1000).decode(errors="backslashreplace").strip()
                        labels[key] = int(text) if text.isdecimal() and text.isascii() else text
                    else:
                        tree.leave_out(f"member of a tar (.{suffix})", f"{file}:{member.name}")
        except tarfile.TarError as error:
            raise collected.fail(f"{file} is no whole tar: {error}; write it again") from error
        if alone := sorted(images.keys() ^ labels.keys()):
            raise collected.fail(
                f"{file}: {alone[0]} has {'no .cls' if alone[0] in images else 'a .cls but no image'}, and so have "
                f"{len(alone) - 1} other keys: each image needs KEY.cls beside it"
            )
        for key, (name, start, size) in images.items():
            collected.add(split, labels[key], f"{file}:{name}", file, start, size)


def list_npz(tree: FileTree, chosen: list[str], collected: Collected) -> list[str] | None:
    """Adds the rows of npz files, `images` and `labels`; returns `label_names` if the first has them."""
    names: list[str] | None = None
    for split, file in zip(split_of_files(chosen, collected), chosen, strict=True):
        with tree.root.filesystem.open_input_file(tree.root.fs_path(file)) as source:
            arrays = np.load(source, allow_pickle=False)
            if missing := {"images", "labels"} - set(arrays.files):
                raise collected.fail(f"{file} has no array `{sorted(missing)[0]}`, but {sorted(arrays.files)}")
            labels = arrays["labels"]
            if file == chosen[0] and "label_names" in arrays.files:
                names = [str(name) for name in arrays["label_names"]]
        shape = npz_shape(tree.root, file)
        if labels.ndim != 1 or labels.dtype.kind not in "iuU" or len(labels) != shape[0]:
            raise collected.fail(
                f"{file}: expected {shape[0]} labels, integers or text, found {labels.dtype} {labels.shape}"
            )
        for row, value in enumerate(labels.tolist()):
            collected.add(split, value, f"{file}:{row}", file, row)
    return names


def npz_shape(root: Storage, file: str) -> tuple[int, ...]:
    """Shape of the array `images`, without its pixels: (N, H, W) or (N, H, W, C).

    Raises:
        ValueError: if it is not uint8, or of another shape.
    """
    with _npz_images(root, file) as (shape, _):
        return shape


class _npz_images:
    """Opens the array `images` of an npz file; gives its shape, and a stream that stands at its first byte."""

    def __init__(self, root: Storage, file: str) -> None:
        self._name = root.absolute(file)
        self._source = root.filesystem.open_input_file(root.fs_path(file))

    def __enter__(self) -> tuple[tuple[int, ...], BinaryIO]:
        stream: Any = zipfile.ZipFile(self._source).open("images.npy")
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
        if dtype != np.uint8 or is_fortran or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise ValueError(
                f"{self._name}: expected images uint8 (N, H, W) or (N, H, W, C) with C of 1 or 3, found {dtype} {shape}"
            )
        return shape, stream

    def __exit__(self, *_: object) -> None:
        self._source.close()


def read_images(root: Storage, kind: str, rows: SplitFiles) -> Iterator[Encoded]:
    """The images of `rows` in order. Those of a Parquet or npz file must be in the order of the file; some may be left
    out, as are those that are held out for the test.

    Raises:
        ValueError: if a file has changed since it was listed, or cannot be read; names it.
    """
    if kind in ("parquet", "npz"):
        read = _read_parquet if kind == "parquet" else _read_npz
        position = 0
        for file, group in itertools.groupby(rows.files):
            wanted = rows.starts[position : (position := position + len(list(group)))]
            assert (np.diff(wanted) > 0).all(), f"{file}: the rows are not in the order of the file"
            first = int(wanted[0])
            is_wanted = np.isin(np.arange(first, int(wanted[-1]) + 1), wanted)
            yield from itertools.compress(read(root, file, first, len(is_wanted)), is_wanted)
    else:
        yield from _each(root, rows, lambda file, start, size: _read_range(root, kind, file, start, size, whole=True))


def read_heads(root: Storage, kind: str, rows: SplitFiles) -> Iterator[Callable[[], BinaryIO]]:
    """For each of `rows` a function that opens it for reading its header; of Parquet, all bytes are read at once."""
    if kind == "parquet":
        for data in read_images(root, kind, rows):
            yield lambda data=data: io.BytesIO(data if isinstance(data, bytes) else b"")  # type: ignore[misc]
        return
    if kind != "tar" and root.is_local:
        for file in rows.files:
            yield lambda file=file: _open_local(root, file)  # type: ignore[misc]
        return
    heads = _each(root, rows, lambda file, start, size: _read_range(root, kind, file, start, size, whole=False))
    for head in heads:
        yield lambda head=head: io.BytesIO(head)  # type: ignore[misc]


def _open_local(root: Storage, file: str) -> BinaryIO:
    try:
        return open(root.fs_path(file), "rb")
    except OSError as error:
        raise ValueError(f"{root.absolute(file)} cannot be read: {error}") from error


def _each(root: Storage, rows: SplitFiles, read: Callable[[str, int, int], T]) -> Iterator[T]:
    """`read` of each row, in order; of a store, several at a time, since each has to be waited for."""
    places = zip(rows.files, rows.starts.tolist(), rows.sizes.tolist(), strict=True)
    if root.is_local:
        yield from itertools.starmap(read, places)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        while chunk := list(itertools.islice(places, _BATCH_ROWS)):
            yield from pool.map(lambda place: read(*place), chunk)


def _read_range(root: Storage, kind: str, file: str, start: int, size: int, whole: bool) -> bytes:
    """An image file, or of a large one its first bytes."""
    try:
        with root.filesystem.open_input_file(root.fs_path(file)) as source:
            found = source.size() if kind != "tar" else size
            data = source.read_at(size if whole else min(size, HEAD_BYTES), start)
    except FileNotFoundError as error:
        raise ValueError(f"{root.absolute(file)} is gone since it was listed: give the command again") from error
    except OSError as error:
        raise ValueError(f"{root.absolute(file)} cannot be read: {error}") from error
    if found != size or (whole and len(data) != size):
        raise ValueError(f"{root.absolute(file)} has changed since it was listed: give the command again")
    return data


def _read_parquet(root: Storage, file: str, start: int, count: int) -> Iterator[Encoded]:
    with root.filesystem.open_input_file(root.fs_path(file)) as source:
        parquet = pq.ParquetFile(source)
        image = _column(parquet.schema_arrow, IMAGE_COLUMNS)
        if image is None or not is_encoded(parquet.schema_arrow.field(image).type):
            raise ValueError(f"{root.absolute(file)} has changed since it was listed: give the command again")
        groups, skip = row_groups(parquet, start, start + count)
        left = count
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[image]):
            column = batch.column(0)
            values = column.field("bytes") if pa.types.is_struct(column.type) else column
            valid = column.is_valid()
            for value, is_there in zip(values, valid, strict=True):
                if skip:
                    skip -= 1
                elif left:
                    left -= 1
                    yield value.as_py() if is_there.as_py() else None


def row_groups(parquet: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that have the rows from `start` to `stop`, and how many rows of the first come before."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = [i for i, size in enumerate(sizes) if starts[i] < stop and starts[i] + size > start]
    return groups, start - int(starts[groups[0]])


def _read_npz(root: Storage, file: str, start: int, count: int) -> Iterator[Encoded]:
    with _npz_images(root, file) as (shape, stream):
        row_bytes = int(np.prod(shape[1:]))
        stream.seek(stream.tell() + start * row_bytes)
        for _ in range(count):
            yield np.frombuffer(stream.read(row_bytes), np.uint8).reshape(shape[1:])
