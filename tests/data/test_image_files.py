"""Every kind of input is divided into the same parts each time, each row is in one part, and errors are reported."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.image_decoding import Resize
from pipeline.data.image_files import ImageInput, Part, list_parts, read_part
from pipeline.data.rows import Rows
from pipeline.data.shards import write_rows
from pipeline.storage import Storage

SHAPE = (8, 6, 3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (25, *SHAPE), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind)
    return data.getvalue()


def read_all(source: ImageInput, shape: tuple[int, ...] = SHAPE, resize: Resize | None = None) -> pa.Table:
    for part in source.parts:
        assert Part.from_json(part.to_json()) == part
    tables = [read_part(part, source.kind, source.root, shape, resize) for part in source.parts]
    assert [table["part"][0].as_py() for table in tables] == list(range(len(tables)))
    return pa.concat_tables(tables)


def pixels(table: pa.Table) -> np.ndarray:
    return table["image"].combine_chunks().to_numpy_ndarray()


def test_npz(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "images.npz", images=images, row_ids=np.arange(25) * 3)
    source = list_parts(str(tmp_path / "images.npz"), 10)
    assert [part.num_rows for part in source.parts] == [10, 10, 5]
    table = read_all(source)
    np.testing.assert_array_equal(pixels(table), images)
    assert table["row_id"].to_pylist() == [3 * i for i in range(25)]
    assert table["error"].null_count == table["name"].null_count == 25


@pytest.mark.parametrize("row_group_size", [4, 7, 100])
def test_parquet_of_tensors(tmp_path: Path, images: np.ndarray, row_group_size: int) -> None:
    (tmp_path / "folder").mkdir()
    for name, rows in (("a", slice(0, 15)), ("b", slice(15, 25))):
        columns = {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images[rows]),
            "other": pa.array(range(25)[rows]),
        }
        pq.write_table(pa.table(columns), tmp_path / "folder" / f"{name}.parquet", row_group_size=row_group_size)
    (tmp_path / "folder" / ".notes.parquet").write_text("not data")
    source = list_parts(str(tmp_path / "folder"), 10)
    assert [part.num_rows for part in source.parts] == [10, 5, 10]
    table = read_all(source)
    np.testing.assert_array_equal(pixels(table), images)
    assert table["row_id"].to_pylist() == list(range(25)), "without ids of its own the index in the whole input"


def test_shards_of_a_run_can_be_classified(tmp_path: Path, images: np.ndarray) -> None:
    rows = Rows(np.arange(25) + 7, images, np.zeros(25, np.int32))
    write_rows(rows, Storage(str(tmp_path)), "shards/00000.parquet")
    table = read_all(list_parts(str(tmp_path / "shards"), 10))  # parts begin in the middle of the file
    np.testing.assert_array_equal(pixels(table), images)
    assert table["row_id"].to_pylist() == rows.row_ids.tolist()
    assert table["error"].null_count == 25


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_of_encoded_images(tmp_path: Path, images: np.ndarray, nested: bool) -> None:
    values: list[bytes | None] = [encoded(image) for image in images]
    values[3], values[7] = None, b"no image"
    column = [value and {"bytes": value, "path": "x"} for value in values] if nested else values
    pq.write_table(pa.table({"image": column, "row_id": range(100, 125)}), tmp_path / "images.parquet")
    table = read_all(list_parts(str(tmp_path / "images.parquet"), 10))
    right = [i for i in range(25) if i not in (3, 7)]
    np.testing.assert_array_equal(pixels(table)[right], images[right])
    assert not pixels(table)[[3, 7]].any()
    errors = table["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error] == [3, 7]
    assert (errors[3], errors[7]) == ("is missing", "is of no known image format")
    assert table["row_id"].to_pylist() == list(range(100, 125))


def test_a_folder_of_images(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "sub").mkdir()
    for number, image in enumerate(images):
        (tmp_path / ("sub" if number % 2 else ".") / f"{number:02d}.png").write_bytes(encoded(image))
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("nor this")
    (tmp_path / "04.png").write_bytes(encoded(images[4])[:60])
    (tmp_path / "06.png").write_bytes(b"")
    Image.fromarray(images[8]).resize((9, 7)).save(tmp_path / "08.png")
    Image.fromarray(images[10]).convert("L").save(tmp_path / "10.png")
    table = read_all(list_parts(str(tmp_path), 4))
    assert table["name"].to_pylist() == sorted(table["name"].to_pylist())
    rows = {row["name"]: row["error"] for row in table.select(["name", "error"]).to_pylist()}
    assert len(rows) == 25
    errors = {name: error for name, error in rows.items() if error}
    assert errors.keys() == {"04.png", "06.png", "08.png"}
    assert "truncated" in errors["04.png"] or "cannot be decoded" in errors["04.png"]
    assert errors["06.png"] == "is of no known image format"
    assert errors["08.png"] == "is of 9 x 7 pixels, the model takes 6 x 8: give --resize"
    found = dict(zip(table["name"].to_pylist(), pixels(table), strict=True))
    np.testing.assert_array_equal(found["sub/05.png"], images[5])
    assert (found["10.png"] == found["10.png"][..., :1]).all(), "a grey image in a coloured model"
    resized = read_all(list_parts(str(tmp_path), 4), resize="stretch")
    assert [
        name for name, error in zip(resized["name"].to_pylist(), resized["error"].to_pylist(), strict=True) if error
    ] == [
        "04.png",
        "06.png",
    ]
    assert pixels(read_all(list_parts(str(tmp_path), 4), shape=(8, 6, 1))).shape == (25, 8, 6, 1)


def test_an_input_is_known_by_names_sizes_and_times(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=images)
    first = list_parts(str(path), 10)
    assert list_parts(str(path), 10).fingerprint == first.fingerprint
    np.savez(path, images=255 - images)
    assert list_parts(str(path), 10).fingerprint != first.fingerprint


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no such file"):
        list_parts(str(tmp_path / "nothing"), 10)
    with pytest.raises(ValueError, match="neither images"):
        list_parts(str(tmp_path), 10)
    np.savez(tmp_path / "a.npz", pictures=images)
    with pytest.raises(ValueError, match=r"no array `images`, but \['pictures'\]"):
        list_parts(str(tmp_path / "a.npz"), 10)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column `image`"):
        list_parts(str(tmp_path / "a.parquet"), 10)
    np.savez(tmp_path / "b.npz", images=images[:, :4])
    source = list_parts(str(tmp_path / "b.npz"), 10)
    with pytest.raises(ValueError, match=r"takes images uint8 \(8, 6, 3\), these are uint8 \(4, 6, 3\)"):
        read_all(source)
