"""Images in Parquet files, WebDataset tars and npz files: their labels, and the bytes or pixels of any of them.

`parquet_files.py`, `npz_files.py` and `bounded_tar.py` say what is done against files that are made to harm.
"""

import io
import itertools
import json
import socket
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.bounded_tar import BoundedTarInfo
from pipeline.data.collected_images import LONGEST_NAME, MAX_CLASSES, TRAIN, Collected, SplitFiles
from pipeline.data.config import MAX_PIXELS
from pipeline.data.excerpt import excerpt
from pipeline.data.file_tree import IMAGE_SUFFIXES, FileTree
from pipeline.data.image_decoding import most_bytes
from pipeline.data.labelled_images import check_no_split, split_of_files
from pipeline.data.npz_files import NpzImages
from pipeline.data.parquet_files import is_encoded, open_parquet, read_rows
from pipeline.storage import Storage

Encoded = bytes | np.ndarray | None
"""An image file, or uint8 (H, W[, C]); None of a Parquet row without one."""
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
COARSE_COLUMNS = ("coarse_label", "coarse_labels")
HEAD_BYTES = 1 << 16
"""Bytes in which the header of nearly every image file ends."""
_BATCH_ROWS = 64
_THREADS = 16
_GONE = "give the command again if it was deleted meanwhile, or mount the same folder on all hosts"
T = TypeVar("T")


def list_parquet(tree: FileTree, chosen: list[str], collected: Collected) -> list[str] | None:
    """Adds the rows of Parquet files; returns the names of the classes if the schema has them."""
    names: dict[str, tuple[list[str] | None, list[str] | None]] = {}
    for split, file in zip(split_of_files(chosen, collected), chosen, strict=True):
        with open_parquet(tree.root, file) as parquet:
            schema = parquet.schema_arrow
            found = excerpt(schema.names)
            image, label, coarse = (
                _column(schema, wanted) for wanted in (IMAGE_COLUMNS, LABEL_COLUMNS, COARSE_COLUMNS)
            )
            if image is None or not _is_one(schema, image, is_encoded):
                raise collected.fail(
                    f"{file} has no column `image` of encoded images (binary, or a struct with bytes): "
                    f"{_kinds(schema, image) or found}"
                )
            if label is None or not _is_one(schema, label, _is_label):
                raise collected.fail(
                    f"{file} has no column `label` of integers or text, but {_kinds(schema, label) or found}"
                )
            if coarse is not None and not _is_one(schema, coarse, _is_label):
                raise collected.fail(
                    f"{file}: the column `{coarse}` has neither integers nor text, but {_kinds(schema, coarse)}: leave "
                    "it out"
                )
            names[file] = _class_names(schema, label), _class_names(schema, coarse) if coarse else None
            columns = [label, coarse] if coarse else [label]
            labels: list[int | str | None] = []
            coarse_labels: list[int | str | None] = []
            for batch in read_rows(tree.root.absolute(file), parquet, columns, 0, parquet.metadata.num_rows):
                for column, values in zip(batch.columns, (labels, coarse_labels), strict=False):
                    values += column.to_pylist()
                    for name in values[-len(batch) :]:
                        collected.check_name(name, file)
        if None in labels:
            raise collected.fail(f"{file}: row {labels.index(None)} has no label: leave such rows out")
        for row, value in enumerate(labels):
            assert value is not None
            collected.add(split or TRAIN, value, f"{file}:{row}", file, row)
            if coarse:
                collected.group(value, coarse_labels[row], f"{file}:{row}")
    _check_same_names(names, collected)
    class_names, collected.coarse_names = names[chosen[0]]
    return class_names


def _check_same_names(names: Mapping[str, object], collected: Collected) -> None:
    """Refuses files that name the classes differently, since a number would be another class in each."""
    first = next(iter(names))
    if different := next((file for file, found in names.items() if found != names[first]), None):
        raise collected.fail(f"{different} has other names of classes than {first}: write them alike")


def _column(schema: pa.Schema, wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in schema.names), None)


def _is_one(schema: pa.Schema, name: str, accepts: Callable[[pa.DataType], bool]) -> bool:
    """Whether one column has this name, and a type that is accepted."""
    return schema.names.count(name) == 1 and accepts(schema.field(name).type)


def _kinds(schema: pa.Schema, name: str | None) -> str:
    """The types of the columns of this name; empty if there is none."""
    return ", ".join(excerpt(field.type) for field in schema if field.name == name)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a categorical of pandas
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Names of a Hugging Face `ClassLabel`."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        names = described["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def list_tars(tree: FileTree, chosen: list[str], collected: Collected) -> None:
    """Adds the images of WebDataset tars: `key.jpg` with its class in `key.cls`, a number or a name."""
    for split, file in zip(split_of_files(chosen, collected), chosen, strict=True):
        images: dict[str, tuple[str, int, int]] = {}
        dotted: dict[str, str] = {}
        labels: dict[str, str | int] = {}
        # Of a local file only the headers are read; a store would be asked once for each.
        open_file = (
            tree.root.filesystem.open_input_file if tree.root.is_local else tree.root.filesystem.open_input_stream
        )
        try:
            with (
                open_file(tree.root.fs_path(file)) as source,
                tarfile.open(fileobj=source, mode="r:" if tree.root.is_local else "r|", tarinfo=BoundedTarInfo) as tar,
            ):
                for member in tar:
                    collected.check_name(member.name, file)
                    path = PurePosixPath(member.name)
                    key, _, suffix = path.name.partition(".")
                    key = str(path.parent / key)
                    if member.isdir():
                        continue
                    if path.name.startswith("."):
                        tree.leave_out("hidden member of a tar", f"{file}:{member.name}")
                        continue
                    if not member.isfile():
                        if member.islnk() or member.issym():
                            raise collected.fail(
                                f"{file}:{member.name} is a link to {excerpt(member.linkname)} and not a file: write "
                                "the tar with --dereference --hard-dereference"
                            )
                        tree.leave_out("member of a tar that is no file", f"{file}:{member.name}")
                        continue
                    if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                        if key in images:
                            raise collected.fail(f"{file} has two images of the key {key}: give each a key of its own")
                        images[key] = (member.name, member.offset_data, member.size)
                    elif suffix == "cls":
                        if key in labels:
                            raise collected.fail(f"{file} has two {key}.cls: write each key once")
                        content = tar.extractfile(member)
                        assert content is not None
                        text = collected.text(content.read(4 * LONGEST_NAME + 4), f"{file}:{member.name}").strip()
                        collected.check_name(text, file)
                        labels[key] = int(text) if text.isdecimal() and text.isascii() else text
                    else:
                        if f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
                            dotted.setdefault(key, member.name)
                        tree.leave_out(f"member of a tar (.{suffix})", f"{file}:{member.name}")
        except PermissionError as error:
            raise collected.fail(f"{file} cannot be read: {error}") from error
        # Of nested headers and of numbers that are none.
        except (tarfile.TarError, OSError, RecursionError, OverflowError) as error:
            raise collected.fail(f"{file} is no whole tar: {excerpt(error)}; write it again") from error
        if lost := [name for key, name in dotted.items() if key not in images]:
            raise collected.fail(
                f"{file}: {excerpt(lost[0])} has a dot in its key, which ends at the first one, and so have "
                f"{len(lost) - 1} other images: name them without"
            )
        if alone := sorted(images.keys() ^ labels.keys()):
            raise collected.fail(
                f"{file}: {alone[0]} has {'no .cls' if alone[0] in images else 'a .cls but no image'}, and so have "
                f"{len(alone) - 1} other keys: each image needs KEY.cls beside it"
            )
        for key, (name, start, size) in images.items():
            if split is None:
                remedy = "put each split in tars of its own, such as train-0.tar"
                check_no_split(name, f"{file}:{name}", remedy, collected)
            collected.add(split or TRAIN, labels[key], f"{file}:{name}", file, start, size)


def list_npz(tree: FileTree, chosen: list[str], collected: Collected) -> list[str] | None:
    """Adds the rows of npz files, `images` and `labels`; returns their `label_names` if they have some."""
    names: dict[str, list[str] | None] = {}
    for split, file in zip(split_of_files(chosen, collected), chosen, strict=True):
        with NpzImages(tree.root, file) as images:
            labels = images.values("labels", "iuU")
            has_names = "label_names" in images.arrays
            names[file] = [str(name) for name in images.values("label_names", "U", MAX_CLASSES)] if has_names else None
        for row, value in enumerate(labels.tolist()):
            collected.add(split or TRAIN, value, f"{file}:{row}", file, row)
    _check_same_names(names, collected)
    return names[chosen[0]]


def read_images(
    root: Storage, kind: str, rows: SplitFiles, max_bytes: int = most_bytes(MAX_PIXELS)
) -> Iterator[Encoded]:
    """The images of `rows` in order. Those of a Parquet or npz file must be in the order of the file; some may be left
    out, as are those that are held out for the test. Of an image file with more than `max_bytes` one byte more is read.

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
        yield from _each(
            root, rows, lambda file, start, size: _read_range(root, kind, file, start, size, max_bytes + 1)
        )


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
    heads = _each(root, rows, lambda file, start, size: _read_range(root, kind, file, start, size, HEAD_BYTES))
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


def _read_range(root: Storage, kind: str, file: str, start: int, size: int, most: int) -> bytes:
    """An image file, or of a large one its first `most` bytes."""
    try:
        with root.filesystem.open_input_file(root.fs_path(file)) as source:
            found = source.size() if kind != "tar" else size
            wanted = min(size, most)
            data = source.read_at(wanted, start)
    except FileNotFoundError as error:
        raise ValueError(f"{root.absolute(file)} is not there on the host {socket.gethostname()}: {_GONE}") from error
    except OSError as error:
        raise ValueError(f"{root.absolute(file)} cannot be read: {error}") from error
    if found != size or len(data) != wanted:
        raise ValueError(f"{root.absolute(file)} has changed since it was listed: give the command again")
    return data


def _read_parquet(root: Storage, file: str, start: int, count: int) -> Iterator[Encoded]:
    with open_parquet(root, file) as parquet:
        image = _column(parquet.schema_arrow, IMAGE_COLUMNS)
        if image is None or not is_encoded(parquet.schema_arrow.field(image).type):
            raise ValueError(f"{root.absolute(file)} has changed since it was listed: give the command again")
        for batch in read_rows(root.absolute(file), parquet, [image], start, count):
            yield from encoded_values(batch.column(0))


def encoded_values(column: pa.Array) -> Iterator[bytes | None]:
    """The bytes of each row of a column that `is_encoded`; None where there is none."""
    values = column.field("bytes") if pa.types.is_struct(column.type) else column
    for value, is_there in zip(values, column.is_valid(), strict=True):
        yield value.as_py() if is_there.as_py() else None


def _read_npz(root: Storage, file: str, start: int, count: int) -> Iterator[Encoded]:
    with NpzImages(root, file) as images:
        yield from images.rows(start, count)
