"""Images of a folder, of Parquet files or of an npz file, in fixed parts that any process can read again.

What decides the parts is listed without reading an image, so that a job which was cut off finds the same ones.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.config import MAX_PIXELS
from pipeline.data.excerpt import excerpt
from pipeline.data.file_tree import IMAGE_SUFFIXES, list_files, suffix_of
from pipeline.data.image_containers import encoded_values
from pipeline.data.image_decoding import Resize, decode, most_bytes
from pipeline.data.npz_files import NpzImages
from pipeline.data.parquet_files import check_columns, is_encoded, open_parquet, read_rows, row_without_value
from pipeline.data.ray_tensors import tensor_pixels, tensor_shape
from pipeline.data.shards import pixel_shape, with_tensors
from pipeline.storage import Storage


@dataclass(frozen=True)
class Part:
    """Rows that are read, and whose results are written, together.

    Attributes:
        number: from 0.
        first_row: index of its first row in the whole input.
        files: paths of images; or one Parquet or npz file.
        start, stop: rows of that one file.
    """

    number: int
    first_row: int
    files: tuple[str, ...]
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Part":
        fields = json.loads(text)
        return cls(**fields | {"files": tuple(fields["files"])})


@dataclass(frozen=True)
class ImageInput:
    """All parts of an input.

    Attributes:
        kind: `images`, `parquet` or `npz`.
        root: storage of the files.
        fingerprint: SHA-256 over names, sizes and times of all files: another one is another input.
        left_out: number of files and folders that are no part of the input, by reason.
        files: size in bytes and time of change in ns of all files of the input, by their paths below `root`.
    """

    kind: str
    root: Storage
    parts: tuple[Part, ...]
    fingerprint: str
    left_out: Mapping[str, int]
    files: Mapping[str, tuple[int, int]]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def list_parts(uri: str, part_rows: int, output: Storage | None = None) -> ImageInput:
    """Cuts an input into parts of at most `part_rows` rows.

    Args:
        uri: a folder of images (searched through, in order of their paths), a folder of Parquet files, a Parquet file
            or an npz file. A part never spans two Parquet files; those with row groups of about `part_rows` rows are
            read quickest.
        output: where the results go; what lies there is no part of the input, if it is below it.

    Raises:
        ValueError: if there is no such thing, or nothing in it.
    """
    tree = list_files(uri, "input", output)
    root, infos = tree.root, tree.files
    suffixes = {suffix_of(name) for name in infos}
    if suffixes & {".parquet"}:
        kind, chosen = "parquet", [name for name in infos if suffix_of(name) == ".parquet"]
    elif ".npz" in suffixes and not suffixes & set(IMAGE_SUFFIXES):
        kind, chosen = "npz", [name for name in infos if suffix_of(name) == ".npz"]
    else:
        # By suffix and not by content: what claims to be an image and is none is reported, not passed over.
        kind, chosen = "images", [n for n in infos if suffix_of(n) in IMAGE_SUFFIXES]
    tree.leave_out_others(chosen)
    if not chosen:
        left = "; ".join(f"{len(names):,}: {reason}" for reason, names in sorted(tree.left_out.items()))
        raise ValueError(
            f"input = {uri!r} holds neither images ({', '.join(IMAGE_SUFFIXES)}) nor Parquet nor npz files"
            + f", but what is left out ({excerpt(left)})" * bool(left)
        )
    parts: list[Part] = []
    if kind == "images":
        for start in range(0, len(chosen), part_rows):
            files = tuple(chosen[start : start + part_rows])
            parts.append(Part(len(parts), start, files, 0, len(files)))
    else:
        first = 0
        for name in chosen:
            rows = _num_rows(kind, root, name)
            for start in range(0, rows, part_rows):
                stop = min(start + part_rows, rows)
                parts.append(Part(len(parts), first + start, (name,), start, stop))
            first += rows
    if not parts:
        raise ValueError(f"input = {uri!r} has no rows")
    left_out = {reason: len(names) for reason, names in sorted(tree.left_out.items())}
    listed = {name: infos[name] for name in chosen}
    return ImageInput(kind, root, tuple(parts), tree.fingerprint(chosen), left_out, listed)


def read_part(
    part: Part,
    kind: str,
    root: Storage,
    image_shape: Sequence[int],
    resize: Resize | None,
    max_pixels: int = MAX_PIXELS,
) -> pa.Table:
    """The rows of a part. Encoded images of another size are fitted by `resize`; without it they are errors.

    Those with more than `max_pixels` are errors in any case.

    Returns:
        `part` int64, `row_id` int64 (the input's own, or the index in the input), `name` (path of the image, or null),
        `image` uint8 tensor (H, W, C) and `error`: null, or why there is no image, which is then black.

    Raises:
        ValueError: if a Parquet or npz file as a whole is not of the right form.
    """
    row_ids = np.arange(part.first_row, part.first_row + part.num_rows)
    names: list[str | None] = [None] * part.num_rows
    errors: list[str | None] = [None] * part.num_rows
    if kind == "images":
        names = list(part.files)
        encoded = (functools.partial(_read_image, root, name, most_bytes(max_pixels)) for name in part.files)
        images, errors = _decode_all(encoded, part.num_rows, image_shape, resize, max_pixels)
    elif kind == "npz":
        file = _open_npz(root.uri, part.files[0])
        _check_array(np.dtype(np.uint8), file.shape[1:], image_shape, root.absolute(part.files[0]))
        images = np.stack(list(file.rows(part.start, part.num_rows)))
        if "row_ids" in file.arrays:
            row_ids = _int64(file.values("row_ids", "iu")[part.start : part.stop], root.absolute(part.files[0]))
    else:
        with _opened_parquet(root, part.files[0], image_shape) as (parquet, columns):
            batches = read_rows(root.absolute(part.files[0]), parquet, columns, part.start, part.num_rows)
            if is_encoded(parquet.schema_arrow.field("image").type):
                ids: list[pa.Array] = []
                encoded = (functools.partial(_bytes_of, value) for value in _images(batches, ids))
                images, errors = _decode_all(encoded, part.num_rows, image_shape, resize, max_pixels)
            else:
                table = pa.Table.from_batches(list(batches))
                ids = table["row_id"].chunks if "row_id" in columns else []
                errors = [None if there else "is missing" for there in table["image"].is_valid().to_pylist()]
                if (shape := tensor_shape(parquet.schema_arrow.field("image"))) is not None:
                    images = _named(root.absolute(part.files[0]), tensor_pixels, table["image"], shape)
                else:  # the shards of a run can be classified too
                    images = with_tensors(table)["image"].combine_chunks().to_numpy_ndarray().copy()
                    images[[error is not None for error in errors]] = 0
        if "row_id" in columns:
            if (column := pa.chunked_array(ids)).null_count:
                raise ValueError(f"{root.absolute(part.files[0])}: some rows have no row_id: write it again")
            row_ids = _int64(column.to_numpy(), root.absolute(part.files[0]))
    return pa.table(
        {
            "part": pa.array(np.full(part.num_rows, part.number)),
            "row_id": pa.array(row_ids, pa.int64()),
            "name": pa.array(names, pa.string()),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images)),
            "error": pa.array(errors, pa.string()),
        }
    )


def _int64(row_ids: np.ndarray, path: str) -> np.ndarray:
    if len(row_ids) and (top := int(row_ids.max())) >= 2**63:
        raise ValueError(f"{path} has the row_id {top}, which is no int64: give row ids below 2**63")
    return row_ids.astype(np.int64)


def _num_rows(kind: str, root: Storage, name: str) -> int:
    if kind == "npz":
        with NpzImages(root, name) as images:
            return images.shape[0]
    with open_parquet(root, name) as parquet:
        if "image" not in parquet.schema_arrow.names:
            found = excerpt(parquet.schema_arrow.names)
            raise ValueError(f"{root.absolute(name)} has no column `image`, but {found}")
        return parquet.metadata.num_rows


@functools.lru_cache(maxsize=1)
def _open_npz(root_uri: str, name: str) -> NpzImages:
    """Kept, for the parts of one file are read one after another, and a compressed file only from its beginning."""
    return NpzImages(Storage(root_uri), name)


@contextlib.contextmanager
def _opened_parquet(root: Storage, name: str, image_shape: Sequence[int]) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
    """The file and the columns to read, whose types have been checked before a value is looked at."""
    with open_parquet(root, name) as parquet:
        schema, path = parquet.schema_arrow, root.absolute(name)
        if "image" not in schema.names:
            raise ValueError(f"{path} has changed since it was listed: give the command again")
        columns = [column for column in ("row_id", "image") if column in schema.names]
        check_columns(root, name, schema, {"row_id": pa.types.is_integer, "image": lambda kind: True})
        kind, shape = schema.field("image").type, pixel_shape(schema) or tensor_shape(schema.field("image"))
        if shape is not None:
            _check_array(np.dtype(np.uint8), shape, image_shape, path)
        elif not is_encoded(kind):
            raise ValueError(
                f"{path}: images are {excerpt(kind)}, not uint8 tensors or binary: write them as fixed_shape_tensor of "
                "uint8, without a permutation, or as the bytes of image files"
            )
        yield parquet, columns


def _images(batches: Iterator[pa.RecordBatch], ids: list[pa.Array]) -> Iterator[bytes | None]:
    """The encoded images of batches; adds their row ids to `ids`."""
    for batch in batches:
        if "row_id" in batch.schema.names:
            ids.append(batch.column("row_id"))
        yield from encoded_values(batch.column("image"))


def check_input(source: ImageInput, image_shape: Sequence[int]) -> None:
    """Checks every Parquet or npz file of an input by its header, before anything is started.

    Raises:
        ValueError: if the images or ids of a file are of another type or shape than a model with `image_shape` takes.
    """
    files = dict.fromkeys(part.files[0] for part in source.parts) if source.kind != "images" else {}
    for name in files:
        if source.kind == "parquet":
            with _opened_parquet(source.root, name, image_shape) as (parquet, _):
                if (row := row_without_value(parquet, "row_id")) is not None:
                    raise ValueError(f"{source.root.absolute(name)}: row {row} has no row_id: give each row one")
        else:
            with NpzImages(source.root, name) as file:
                _check_array(np.dtype(np.uint8), file.shape[1:], image_shape, source.root.absolute(name))
                if "row_ids" in file.arrays:
                    file.values("row_ids", "iu")


def _named(path: str, read: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    """`read(*arguments)`, whose errors name the file."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: write it again") from error


def _check_array(dtype: np.dtype, shape: Sequence[int], image_shape: Sequence[int], path: str) -> None:
    if dtype != np.uint8 or tuple(shape) != tuple(image_shape):
        raise ValueError(f"{path}: the model takes images uint8 {tuple(image_shape)}, these are {dtype} {tuple(shape)}")


def _read_image(root: Storage, name: str, most: int) -> bytes:
    with root.filesystem.open_input_file(root.fs_path(name)) as file:
        return file.read(most + 1)  # one byte too many shows that it is too large


def _bytes_of(value: bytes | None) -> bytes:
    if value is None:
        raise ValueError("is missing")
    return value


def _decode_all(
    encoded: Iterator[Any], count: int, image_shape: Sequence[int], resize: Resize | None, max_pixels: int
) -> tuple[np.ndarray, list[str | None]]:
    """Images, black where there is an error, and the errors."""
    images = np.zeros((count, *image_shape), np.uint8)
    errors: list[str | None] = [None] * count
    for position, read in enumerate(encoded):
        try:
            images[position] = decode(read(), image_shape, resize, max_pixels)
        except (ValueError, OSError) as error:
            errors[position] = str(error)
    return images, errors
