"""Types of columns and arrays, and names of classes, that would give wrong numbers or an error that says nothing."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.image_files import check_input, list_parts, read_part
from pipeline.data.labelled_images import list_images
from pipeline.data.npz_files import NpzImages
from pipeline.storage import Storage

SHAPE = (6, 6, 3)
IMAGES = np.random.default_rng(1).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
LABELS = np.arange(4) % 2


def encoded(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


FILES = [encoded(image) for image in IMAGES]


def parquet(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path / "x.parquet")
    return str(path / "x.parquet")


def npz(path: Path, **arrays: Any) -> str:
    whole: dict[str, Any] = {"images": IMAGES, "labels": LABELS} | arrays
    np.savez(path / "x.npz", **whole)
    return str(path / "x.npz")


def predicted(path: str) -> pa.Table:
    source = list_parts(path, 64)
    check_input(source, SHAPE)
    return read_part(source.parts[0], source.kind, source.root, SHAPE, None)


@pytest.mark.parametrize("permutation", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_tensors_whose_bytes_lie_in_another_order_are_refused(permutation: list[int], tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.uint8(), SHAPE, permutation=permutation)
    values = pa.FixedSizeListArray.from_arrays(pa.array(IMAGES.reshape(-1)), 108)
    path = parquet(tmp_path, image=pa.ExtensionArray.from_storage(kind, values))
    if permutation == [0, 1, 2]:
        np.testing.assert_array_equal(predicted(path)["image"].combine_chunks().to_numpy_ndarray(), IMAGES)
    else:
        with pytest.raises(
            ValueError,
            match=r"x.parquet: images are .*permutation.*not uint8 tensors or binary: .* without a permutation",
        ):
            predicted(path)


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_row_id_that_is_no_int64_is_named(kind: str, tmp_path: Path) -> None:
    ids = np.arange(4, dtype=np.uint64) + np.uint64(2**63)
    made = {
        "parquet": lambda folder, ids: parquet(folder, image=FILES, row_id=ids),
        "npz": lambda folder, ids: npz(folder, row_ids=ids),
    }[kind]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=rf"x.{kind} has the row_id 9223372036854775811, .* below 2\*\*63"):
        predicted(made(tmp_path, ids))
    assert predicted(made(tmp_path / "other", ids - np.uint64(2**63) + np.uint64(7)))["row_id"].to_pylist() == [
        7,
        8,
        9,
        10,
    ]


def test_labels_of_a_categorical_and_of_other_types(tmp_path: Path) -> None:
    categorical = pa.array(["dog", "cat"] * 2).dictionary_encode()
    listing = list_images(parquet(tmp_path, image=FILES, label=categorical))
    assert listing.label_names == ["cat", "dog"]
    assert listing.splits["train"].labels.tolist() == [1, 0, 1, 0]
    for values, found in (([0.0, 1.0], "double"), ([True, False], "bool")):
        with pytest.raises(ValueError, match=f"no column `label` of integers or text, but {found}"):
            list_images(parquet(tmp_path, image=FILES, label=values * 2))
    with pytest.raises(ValueError, match=r"no column `image` of encoded images .*: fixed_size_list"):
        list_images(parquet(tmp_path, image=pa.array([[1, 2]] * 4, pa.list_(pa.uint8(), 2)), label=LABELS))


@pytest.mark.parametrize(
    "described", ["[" * 100_000, "[]", '{"info": {"features": []}}', "1" * 5000, "\xff", '{"info": 3}']
)
def test_a_description_of_the_columns_that_cannot_be_read_is_none(described: str, tmp_path: Path) -> None:
    metadata = {"huggingface": described, "image_shape": described}
    pq.write_table(
        pa.table({"image": FILES, "label": LABELS}).replace_schema_metadata(metadata), tmp_path / "x.parquet"
    )
    assert list_images(str(tmp_path)).label_names == ["0", "1"]
    assert predicted(str(tmp_path))["error"].null_count == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label_names": np.array(["a", "a"])}, "the names of the labels have 'a' twice"),
        ({"label_names": np.array(["caf\xe9", "cafe\u0301"])}, "the names of the labels .* how accents are written"),
        ({"label_names": np.array(["a", ""])}, "has no label"),
        ({"labels": np.array(["a", "b\x1b[2J"] * 2)}, r"has the class 'b\\x1b\[2J', with control characters"),
        ({"labels": np.frombuffer(np.array([0x110000, 65] * 2, "u4"), "U1")}, "characters that are none"),
        ({"labels": np.frombuffer(np.array([0xD800, 65] * 2, "u4"), "U1")}, "characters that are none"),
        ({"images": np.asfortranarray(IMAGES)}, "in Fortran order: save np.ascontiguousarray"),
        ({"images": IMAGES[:, :0]}, r"found uint8 \(4, 0, 6, 3\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "has no images: add some"),
        ({"labels": LABELS - 1}, "labels are from -1 to 0"),
    ],
)
def test_names_and_arrays_that_mean_nothing(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list_images(npz(tmp_path, **arrays))


@pytest.mark.parametrize("other", ["caf\xe9 ", "cafe\u0301", "caf\u200b\xe9", "\ufeffcaf\xe9", "caf\xe9\ufe0f"])
def test_two_classes_that_look_alike_are_refused(other: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"differ in blanks, in characters .* or in how accents are written .*xe9.*: ren"
    ):
        list_images(npz(tmp_path, labels=np.array(["caf\xe9", other] * 2)))


def test_names_that_are_unusual_and_no_harm(tmp_path: Path) -> None:
    # A space that does not break, a family of emoji with joiners, and text from right to left.
    names = ["caf\xe9\xa0noir", "\U0001f468‍\U0001f469", "عربي", "a", "A", "..", "CON", "a" * 255, "name.cls"]
    names += ["\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in flag) for flag in ("gbeng", "gbsct")]
    images = np.resize(IMAGES, (len(names), *SHAPE))
    assert list_images(npz(tmp_path, images=images, labels=np.array(names))).label_names == sorted(names)


def test_an_npz_with_too_many_arrays_or_one_twice(tmp_path: Path) -> None:
    def write(times: int, others: int) -> NpzImages:
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
            for name in ("images", "labels") * times:
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.save(member, IMAGES if name == "images" else LABELS)
            for number in range(others):
                file.writestr(f"{number}.npy", b"")
        return NpzImages(Storage(str(tmp_path)), "x.npz")

    with write(1, 1000) as images:
        np.testing.assert_array_equal(list(images.rows(0, 4)), IMAGES)
    with pytest.warns(UserWarning, match="Duplicate name"), pytest.raises(ValueError, match="has two arrays `images`"):
        write(2, 0)
    with pytest.raises(ValueError, match=r"lists its arrays in [\d,]+ bytes: write it with fewer"):
        write(1, 25_000)
    # The record of a file with more than 4 GiB stands before the end record, whose own number then has all bits set.
    data = bytearray((tmp_path / "x.npz").read_bytes())
    end = data.rindex(b"PK\5\6")
    size = data[end + 12 : end + 16]
    data[end + 12 : end + 16] = b"\xff" * 4
    data[end:end] = b"PK\6\6" + struct.pack("<Q", 44) + bytes(28) + size + bytes(4) + bytes(8)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match="lists its arrays in"):
        NpzImages(Storage(str(tmp_path)), "x.npz")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([b"", b"1"], "x.tar:0.png has no label"),
        ([b"a\0b", b"c"], "with control characters"),
        ([b"caf\xe9", b"c"], r"x.tar:0.cls is not UTF-8 \(.* at byte 3\): save it as UTF-8"),
        ([b"a" * 1001, b"c"], "has a name of 1,001 characters"),
        (["\xe9".encode() * 1000, b"c"], ""),
        ([b"cat", b"1.0"], ""),
        ([b"cat", b"1"], "some labels are numbers and some are text"),
    ],
)
def test_classes_of_a_tar(classes: list[bytes], message: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, name in enumerate(classes * 2):
            for suffix, data in (("png", FILES[number]), ("cls", name)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if message:
        with pytest.raises(ValueError, match=message):
            list_images(str(tmp_path / "x.tar"))
    else:
        names = sorted(name.decode() for name in classes)
        assert list_images(str(tmp_path / "x.tar")).label_names == names


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "0,10,1099511627776,5", "GNU.sparse.size": "2199023255552"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.png", "GNU.sparse.realsize": "9"},
    ],
)
def test_members_with_holes_are_refused(headers: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.pax_headers, member.size = headers, len(FILES[0])
        tar.addfile(member, io.BytesIO(FILES[0]))
    with pytest.raises(ValueError, match="no whole tar: a member has holes"):
        list_images(str(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"file_name,label\na.png,x\nb.png,y\n", ""),
        (b'\xef\xbb\xbffile_name,label\r\na.png,x\r\nb.png,"y, of the sea"\r\n', ""),
        (b"file_name,label\na.png,caf\xe9\nb.png,y\n", r"metadata.csv is not UTF-8 \(.* byte 25\): save it as UTF-8"),
        ("file_name,label\na.png,x\n".encode("utf-16"), "metadata.csv is not UTF-8"),
        (b"file_name;label\na.png;x\n", r"no column file_name, but \['file_name;label'\]: .* with commas between"),
        (b"file_name,label,label\na.png,x,y\n", "metadata.csv has two columns 'label'"),
        (b"file_name,label\na.png,y, of the sea\n", "line 2: 'a.png' has more fields than there are columns"),
        (b"file_name,label\na.png, \nb.png,x\n", "a.png has no label"),
    ],
)
def test_tables_that_say_something_else(table: bytes, message: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(FILES[0])
    (tmp_path / "metadata.csv").write_bytes(table)
    if message:
        with pytest.raises(ValueError, match=message):
            list_images(str(tmp_path))
    else:
        assert list_images(str(tmp_path)).label_names == ["x", "y" if b"sea" not in table else "y, of the sea"]
