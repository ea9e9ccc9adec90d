"""Files that are made to harm: nothing in them runs, none takes much memory, and each ends in a result or an error.

`hostile_reader.py` reads them in a process of its own, with a limit to its memory. `test_hostile_archives.py` has
pickles and tars.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.image_decoding import decode
from pipeline.data.image_files import list_parts, read_part
from pipeline.data.labelled_images import list_images

READER = Path(__file__).with_name("hostile_reader.py")
SHAPE = (8, 6, 3)
MIB = 1 << 20
ADDRESSES_MIB = 2000
"""Limit of the address space, of which libraries reserve more than they use; the memory in use is checked apart."""
LARGEST_IMAGE = (9459, 9459)
"""As many pixels as are decoded."""


def png(size: tuple[int, int] = (6, 8), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, "PNG", compress_level=1)
    return data.getvalue()


def write_parquet(path: Path, column: Any) -> None:
    table = pa.table({"image": column, "label": pa.array(np.arange(len(column)) % 2)})
    pq.write_table(table, path, compression="zstd")


def repeated(value: str | bytes, count: int) -> pa.Array:
    """An array that takes little more room than one of its values."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [value])


def with_rows_claimed(path: Path, claimed: int, found: int) -> None:
    """Replaces the number of rows in the footer, a varint of Thrift in zigzag, by another of the same length."""

    def varint(value: int) -> bytes:
        value, out = value << 1, b""
        while value > 0x7F:
            out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
        return out + bytes([value])

    data, old, new = path.read_bytes(), varint(found), varint(claimed)
    assert len(old) == len(new)
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    footer = data[start:].replace(old, new)
    assert footer != data[start:]
    path.write_bytes(data[:start] + footer)


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_npz(path: Path, **arrays: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in arrays.items():
            file.writestr(f"{name}.npy", data)


def tar_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo("x")
    member.size = abs(size)
    member.type = kind
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[:100] = name.ljust(100, b"\0")
    if size < 0:
        head[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


# Each writes a file of at most some megabytes that would take much more; beside it the memory that it may take, in MiB.
def few_values_many_rows(path: Path) -> None:
    table = pa.table({"image": repeated(bytes(MIB), 500), "label": [0, 1] * 250})
    pq.write_table(table, path.with_suffix(".parquet"), store_schema=False)


def large_values_many_rows(path: Path) -> None:
    table = pa.table({"image": repeated(bytes(150 * MIB), 4), "label": [0, 1] * 2})
    pq.write_table(table, path.with_suffix(".parquet"), store_schema=False, compression="zstd")


def one_large_row(path: Path) -> None:
    write_parquet(path.with_suffix(".parquet"), [bytes(300 * MIB), png()])


def long_labels(path: Path) -> None:
    table = pa.table({"image": repeated(png(), 2000), "label": repeated("a" * MIB, 2000)})
    pq.write_table(table, path.with_suffix(".parquet"), store_schema=False)


def npz_of_other_arrays(path: Path) -> None:
    pixels = npy_header((2, 8, 6, 3)) + bytes(2 * 8 * 6 * 3)
    other = npy_header((2 << 30,)) + bytes(16 * MIB)
    write_npz(path.with_suffix(".npz"), images=pixels, labels=npy_header((2,), "|i1") + b"\0\1", row_ids=other)


def npz_of_large_labels(path: Path) -> None:
    pixels = npy_header((4, 8, 6, 3)) + bytes(4 * 8 * 6 * 3)
    write_npz(path.with_suffix(".npz"), images=pixels, labels=npy_header((4,), f"<U{8 * MIB}") + bytes(128 * MIB))


def npz_that_claims(path: Path) -> None:
    write_npz(path.with_suffix(".npz"), images=npy_header((1 << 40, 8, 6, 3)), labels=npy_header((1 << 40,), "<i8"))


def npz_with_a_long_header(path: Path) -> None:
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2 << 30) + b" " * (128 * MIB)
    write_npz(path.with_suffix(".npz"), images=header, labels=header)


def gzip_with_a_long_name(path: Path) -> None:
    with gzip.open(path.with_suffix(".tar.gz"), "wb", compresslevel=1) as stream:
        stream.write(tar_header(b"././@LongLink", 2048 * MIB, b"L"))
        for _ in range(256):
            stream.write(bytes(MIB))


BOMBS: list[tuple[Callable[[Path], None], int, str]] = [
    (few_values_many_rows, 250, "500 rows, 500 without an image"),
    (large_values_many_rows, 1300, "4 rows, 4 without an image"),
    (one_large_row, 1300, "2 rows, 1 without an image"),
    (long_labels, 400, "has a name of 1,048,576 characters"),
    (npz_of_other_arrays, 300, "expected 2 row_ids"),
    (npz_of_large_labels, 300, "expected 4 labels"),
    (npz_that_claims, 300, "images must have 158,"),
    (npz_with_a_long_header, 100, "cannot be read"),
    (gzip_with_a_long_name, 200, "a header has 2,147,483,648 bytes"),
]


@pytest.mark.parametrize(("write", "mib", "expected"), BOMBS, ids=[write.__name__ for write, *_ in BOMBS])
def test_a_small_file_takes_little_memory(
    write: Callable[[Path], None], mib: int, expected: str, tmp_path: Path
) -> None:
    write(tmp_path / "hostile")
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 5 * MIB
    result = read_limited(path, ADDRESSES_MIB)
    assert expected in result["message"], result
    assert len(result["message"]) < 4000
    assert result["mib"] < mib


@pytest.mark.parametrize("mode", ["RGBA", pytest.param("I;16", marks=pytest.mark.slow)])
def test_the_largest_image_takes_no_more_than_is_said(mode: str, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(LARGEST_IMAGE, mode))
    result = read_limited(tmp_path, ADDRESSES_MIB)
    assert result["message"].startswith("1 rows, 0 without an image"), result
    assert result["mib"] < 1100


def read_limited(path: Path, mib: int) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(READER.parents[2])}
    command = [sys.executable, str(READER), str(mib), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("column", ["image", "row_id"])
def test_a_column_of_pickled_objects_is_refused_before_a_value_is_looked_at(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(ran),)

    values = pa.ExtensionArray.from_storage(
        ArrowPythonObjectType(), pa.array([pickle.dumps(Attack())] * 2, pa.large_binary())
    )
    columns = {"image": [png()] * 2, "row_id": [0, 1], "label": [0, 1]} | {column: values}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert isinstance(pq.read_schema(tmp_path / "rows.parquet").field(column).type, ArrowPythonObjectType)
    source = list_parts(str(tmp_path), 10)
    with pytest.raises(ValueError, match=r"rows\.parquet.*arrow_pickled_object|images are extension"):
        read_part(source.parts[0], source.kind, source.root, SHAPE, None)
    if column == "image":
        with pytest.raises(ValueError, match="has no column `image` of encoded images"):
            list_images(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["tensor", "encoded"])
def test_rows_that_are_claimed_and_not_there_are_no_black_images(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pixels = np.zeros((70, *SHAPE), np.uint8)
    write_parquet(path, [png()] * 70 if kind == "encoded" else pa.FixedShapeTensorArray.from_numpy_ndarray(pixels))
    with_rows_claimed(path, 3000, 70)
    source = list_parts(str(path), 1024)
    assert source.num_rows == 3000
    with pytest.raises(ValueError, match=r"rows\.parquet (claims 1,024 rows from row 0 on, and has|cannot be read)"):
        read_part(source.parts[0], source.kind, source.root, SHAPE, None)


def test_a_footer_cannot_claim_more_rows_than_the_file_has_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": repeated(png(), 2**21)}), path, store_schema=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"claims 2,097,152 rows, .* bytes"):
        list_parts(str(path), 1024)


def test_a_row_without_pixels_is_an_error_and_no_black_image(tmp_path: Path) -> None:
    column = pa.array([bytes(144), None], pa.binary(144))
    table = pa.table({"image": column}).replace_schema_metadata({"image_shape": json.dumps(SHAPE)})
    pq.write_table(table, tmp_path / "rows.parquet")
    source = list_parts(str(tmp_path), 10)
    table = read_part(source.parts[0], source.kind, source.root, SHAPE, None)
    assert table["error"].to_pylist() == [None, "is missing"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"a.png,{'x' * 200_000}\n", r"metadata\.csv is no table: field larger than field limit"),
        (f"a.png,{'x' * 2000}\n", "has a name of 2,000 characters"),
        (f"{'x' * 100_000}.png,cat\n", "is not among the images"),
        ("../../a.png,cat\n", "is not among the images"),
    ],
)
def test_a_table_of_a_stranger(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{line}")
    with pytest.raises(ValueError, match=message) as caught:
        list_images(str(tmp_path))
    assert len(str(caught.value)) < 1000


def test_a_large_image_is_converted_in_strips_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import image_decoding

    rng = np.random.default_rng(0)
    for shape, kind in (((50, 30, 4), np.uint8), ((50, 30), np.uint16), ((50, 30, 2), np.uint8)):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, np.iinfo(kind).max, shape, dtype=kind)).save(data, "PNG")
        for wanted in ((50, 30, 3), (50, 30, 1)):
            monkeypatch.setattr(image_decoding, "_STRIP_PIXELS", 1 << 22)
            whole = decode(data.getvalue(), wanted, None)
            monkeypatch.setattr(image_decoding, "_STRIP_PIXELS", 7 * 30)
            np.testing.assert_array_equal(decode(data.getvalue(), wanted, None), whole)
