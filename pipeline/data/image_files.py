"""Images of a folder, of Parquet files or of an npz file, in fixed parts that any process can read again.

What decides the parts is listed without reading an image, so that a job which was cut off finds the same ones.
"""

import functools
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.file_tree import IMAGE_SUFFIXES, list_files, suffix_of
from pipeline.data.image_containers import is_encoded, row_groups
from pipeline.data.image_decoding import Resize, decode
from pipeline.data.shards import with_tensors
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
    """

    kind: str
    root: Storage
    parts: tuple[Part, ...]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def list_parts(uri: str, part_rows: int) -> ImageInput:
    """Cuts an input into parts of at most `part_rows` rows.

    Args:
        uri: a folder of images (searched through, in order of their paths), a folder of Parquet files, a Parquet file
            or an npz file. A part never spans two Parquet files; those with row groups of about `part_rows` rows are
            read quickest.

    Raises:
        ValueError: if there is no such thing, or nothing in it.
    """
    tree = list_files(uri, "input")
    root, infos = tree.root, tree.files
    suffixes = {suffix_of(name) for name in infos}
    if suffixes & {".parquet"}:
        kind, chosen = "parquet", [name for name in infos if name.endswith(".parquet")]
    elif suffixes == {".npz"}:
        kind, chosen = "npz", list(infos)
    else:
        # By suffix and not by content: what claims to be an image and is none is reported, not passed over.
        kind, chosen = "images", [n for n in infos if suffix_of(n) in IMAGE_SUFFIXES]
    if not chosen:
        raise ValueError(
            f"input = {uri!r} holds neither images ({', '.join(IMAGE_SUFFIXES)}) nor Parquet nor npz files"
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
    return ImageInput(kind, root, tuple(parts), tree.fingerprint(chosen))


def read_part(part: Part, kind: str, root: Storage, image_shape: Sequence[int], resize: Resize | None) -> pa.Table:
    """The rows of a part. Encoded images of another size are fitted by `resize`; without it they are errors.

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
        encoded = (functools.partial(root.read_bytes, name) for name in part.files)
        images, errors = _decode_all(encoded, part.num_rows, image_shape, resize)
    elif kind == "npz":
        arrays = _load_npz(root.uri, part.files[0])
        images = arrays["images"][part.start : part.stop]
        _check_array(images, image_shape, root.absolute(part.files[0]))
        if "row_ids" in arrays:
            row_ids = arrays["row_ids"][part.start : part.stop]
    else:
        table = with_tensors(_read_rows(part, root))  # the shards of a run can be classified too
        if "row_id" in table.column_names:
            row_ids = table["row_id"].to_numpy()
        column = table["image"].combine_chunks()
        if isinstance(column, pa.FixedShapeTensorArray):
            images = column.to_numpy_ndarray()
            _check_array(images, image_shape, root.absolute(part.files[0]))
        else:
            # By its type and before a value is looked at: Arrow runs the code of extension types.
            if not is_encoded(column.type):
                raise ValueError(
                    f"{root.absolute(part.files[0])}: images are {column.type}, not uint8 tensors or binary"
                )
            if pa.types.is_struct(column.type):
                column = column.field("bytes")
            encoded = (functools.partial(_bytes_of, value) for value in column)
            images, errors = _decode_all(encoded, part.num_rows, image_shape, resize)
    return pa.table(
        {
            "part": pa.array(np.full(part.num_rows, part.number)),
            "row_id": pa.array(row_ids, pa.int64()),
            "name": pa.array(names, pa.string()),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images)),
            "error": pa.array(errors, pa.string()),
        }
    )


def _num_rows(kind: str, root: Storage, name: str) -> int:
    if kind == "npz":
        return len(_load_npz(root.uri, name)["images"])
    with root.filesystem.open_input_file(root.fs_path(name)) as file:
        schema = pq.ParquetFile(file)
        if "image" not in schema.schema_arrow.names:
            raise ValueError(f"{root.absolute(name)} has no column `image`, but {schema.schema_arrow.names}")
        return schema.metadata.num_rows


@functools.lru_cache(maxsize=1)
def _load_npz(root_uri: str, name: str) -> dict[str, np.ndarray]:
    """Kept, for the parts of one file are read one after another and a compressed file cannot be read in part."""
    root = Storage(root_uri)
    with np.load(io.BytesIO(root.read_bytes(name)), allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if "images" not in arrays:
        raise ValueError(f"{root.absolute(name)} has no array `images`, but {sorted(arrays)}")
    return arrays


def _read_rows(part: Part, root: Storage) -> pa.Table:
    """Reads no more row groups than the part touches."""
    with root.filesystem.open_input_file(root.fs_path(part.files[0])) as source:
        file = pq.ParquetFile(source)
        columns = [name for name in ("row_id", "image") if name in file.schema_arrow.names]
        groups, skipped = row_groups(file, part.start, part.stop)
        return file.read_row_groups(groups, columns=columns).slice(skipped, part.num_rows)


def _check_array(images: np.ndarray, image_shape: Sequence[int], path: str) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != tuple(image_shape):
        raise ValueError(
            f"{path}: the model takes images uint8 {tuple(image_shape)}, these are {images.dtype} {images.shape[1:]}"
        )


def _bytes_of(value: Any) -> bytes:
    if (data := value.as_py()) is None:
        raise ValueError("is missing")
    return data


def _decode_all(
    encoded: Iterator[Any], count: int, image_shape: Sequence[int], resize: Resize | None
) -> tuple[np.ndarray, list[str | None]]:
    """Images, black where there is an error, and the errors."""
    images = np.zeros((count, *image_shape), np.uint8)
    errors: list[str | None] = [None] * count
    for position, read in enumerate(encoded):
        try:
            images[position] = decode(read(), image_shape, resize)
        except (ValueError, OSError) as error:
            errors[position] = str(error)
    return images, errors
