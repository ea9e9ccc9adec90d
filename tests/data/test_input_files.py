"""What is looked at in a folder of inputs, what is left out with a reason, and files that are refused by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.file_tree import list_files
from pipeline.data.image_files import check_input, list_parts, read_part
from pipeline.data.labelled_images import list_images
from pipeline.storage import Storage

ROOT = Path(__file__).parents[2]
SHAPE = (4, 5, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)


def write_image(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGES[number]).save(path, "PNG")


def write_clutter(folder: Path) -> None:
    """Three images as a camera names them, and what other programs leave beside them."""
    for number, name in enumerate(("_DSC0001.JPG", "_set/a.png", "b.PNG")):
        write_image(folder / name, number)
    write_image(folder / ".ipynb_checkpoints" / "b-checkpoint.png")
    write_image(folder / "__MACOSX" / "b.png")
    write_image(folder / "@eaDir" / "b.png" / "SYNOPHOTO_THUMB_M.jpg")
    (folder / "c.HEIC").write_bytes(b"of another kind")
    (folder / "d.heic").write_bytes(b"of another kind")
    (folder / "notes").write_text("without a suffix")
    (folder / "again").symlink_to(".")
    (folder / "_set" / "up").symlink_to("..")
    (folder / "gone").symlink_to("nowhere")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"")


def test_batch_inference_says_what_it_leaves_out(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_clutter(folder)
    for name in ("_job.json", "part-000000.parquet"):
        (folder / "output").mkdir(exist_ok=True)
        (folder / "output" / name).write_text("a result")
    (tmp_path / "link").symlink_to(folder)
    through_link = list_parts(str(folder), 10, Storage(str(tmp_path / "link" / "output")))
    source = list_parts(str(folder), 10, Storage(str(folder / "output")))
    assert through_link.left_out == source.left_out
    (part,) = source.parts
    assert (source.kind, part.files) == ("images", ("_DSC0001.JPG", "_set/a.png", "b.PNG"))
    assert source.left_out == {
        "file of another kind (.heic)": 2,
        "file of another kind (no suffix)": 1,
        "hidden": 1,
        "in the folder of the results": 2,
        "kept by an operating system": 2,
        "link that leads nowhere": 1,
        "link to a folder above it": 2,
        "name is not UTF-8": 1,
    }


def test_training_takes_the_same_files(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_image(tmp_path / name / "_DSC0001.JPG")
        write_image(tmp_path / name / ".ipynb_checkpoints" / "x.png")
    write_image(tmp_path / "__MACOSX" / "cat" / "x.png")
    listing = list_images(str(tmp_path))
    assert listing.splits["train"].names == ["cat/_DSC0001.JPG", "dog/_DSC0001.JPG"]
    assert {reason: len(names) for reason, names in listing.tree.left_out.items()} == {
        "hidden": 2,
        "kept by an operating system": 1,
    }


@pytest.mark.parametrize("name", ["A.PARQUET", "folder"])
def test_suffixes_in_capitals(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    table = pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)})
    for path in (tmp_path / "A.PARQUET", tmp_path / "folder" / "B.Parquet"):
        pq.write_table(table, path)
    assert list_parts(str(tmp_path / name), 10).num_rows == 6
    np.savez(tmp_path / "C.npz", images=IMAGES)
    (tmp_path / "C.npz").rename(tmp_path / "folder" / "C.NPZ")
    assert list_parts(str(tmp_path / "folder" / "C.NPZ"), 10).kind == "npz"


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    """As an ordinary user, because root may read everything."""
    write_image(tmp_path / "open" / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder != Path("/tmp"):
            os.chmod(folder, 0o755)
    code = (
        "import os, sys\nfrom pipeline.data.image_files import list_parts\nos.geteuid() or os.setuid(65534)\n"
        "try: list_parts(sys.argv[1], 10)\nexcept ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    (tmp_path / "closed").chmod(0o755)
    assert f"input = '{tmp_path}' cannot be listed" in result.stdout, result.stderr
    assert str(tmp_path / "closed") in result.stdout


def list_of_bytes(names: dict[bytes, bytes]) -> pa.Table:
    """Ray Data's tensors, as a process sees them that knows nothing of Ray."""
    values = pa.array(IMAGES.reshape(len(IMAGES), -1).tolist(), pa.large_list(pa.uint8()))
    field = pa.field("image", values.type, metadata=names)
    return pa.table([values], pa.schema([field]))


def ray_tensors() -> pa.Table:
    from ray.data.extensions import ArrowTensorArray

    images: pa.ExtensionArray = ArrowTensorArray.from_numpy(IMAGES)
    return pa.table({"image": pa.chunked_array([images[:2], images[2:5], images[5:]])})


def without_ray() -> pa.Table:
    return list_of_bytes(
        {
            b"ARROW:extension:name": b"ray.data.arrow_tensor_v2",
            b"ARROW:extension:metadata": json.dumps(SHAPE).encode(),
        }
    )


@pytest.mark.parametrize("make", [ray_tensors, without_ray])
def test_tensors_of_ray_data_are_read(make: Callable[[], pa.Table], tmp_path: Path) -> None:
    path = tmp_path / "rays.parquet"
    pq.write_table(make(), path, row_group_size=4)
    source = list_parts(str(path), 4)
    check_input(source, SHAPE)
    tables = [read_part(part, source.kind, source.root, SHAPE, None) for part in source.parts]
    found = np.concatenate([table["image"].combine_chunks().to_numpy_ndarray() for table in tables])
    np.testing.assert_array_equal(found, IMAGES)
    assert all(table["error"].null_count == len(table) for table in tables)
    with pytest.raises(ValueError, match=r"takes images uint8 \(5, 4, 3\), these are uint8 \(4, 5, 3\)"):
        check_input(source, (5, 4, 3))


def nested_lists() -> pa.Table:
    return pa.table({"image": pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))})


def float_tensors() -> pa.Table:
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES.astype(np.float32))})


def ids(values: pa.Array) -> pa.Table:
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)
    return pa.table({"image": images, "row_id": values})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nested_lists, "images are list<.*, not uint8 tensors or binary: write them as fixed_shape_tensor"),
        (float_tensors, "images are .*float.*, not uint8 tensors or binary"),
        (lambda: list_of_bytes({}), "images are large_list<.*, not uint8 tensors or binary"),
        (lambda: pa.table({"image": ["a.png"]}), "images are string, not uint8 tensors or binary"),
        (lambda: pa.table({"image": pa.nulls(3)}), "images are null, not uint8 tensors or binary"),
        (lambda: ids(pa.array(list("abcdef"))), "the column `row_id` is string"),
        (lambda: ids(pa.array(np.arange(6.0))), "the column `row_id` is double"),
    ],
)
def test_columns_are_judged_before_anything_starts(make: Callable[[], pa.Table], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(make(), path)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        check_input(list_parts(str(path), 10), SHAPE)


def test_a_row_without_an_id_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(ids(pa.array([1, 2, None, 4, 5, 6])), path)
    source = list_parts(str(path), 10)
    with pytest.raises(ValueError, match=rf"{path}: row 2 has no row_id"):
        check_input(source, SHAPE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, "expected images uint8"),
        ({"images": IMAGES, "row_ids": np.array(list("abcdef"))}, "expected 6 row_ids, integers"),
        ({"images": IMAGES, "row_ids": np.arange(5)}, "expected 6 row_ids, integers"),
        ({"images": np.array([None, 1])}, "cannot be read"),
    ],
)
def test_npz_arrays_are_judged_before_anything_starts(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        check_input(list_parts(str(path), 10), SHAPE)


@pytest.mark.parametrize("name", ["a.parquet", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"no such format" * 100])
def test_a_broken_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name} cannot be read"):
        list_parts(str(tmp_path), 10)
    with pytest.raises(ValueError, match=rf"{tmp_path / name} cannot be read"):
        list_images(str(tmp_path))


def test_the_results_of_an_earlier_job_are_no_input(tmp_path: Path) -> None:
    write_image(tmp_path / "results" / "a.png")
    write_image(tmp_path / "results-2" / "b.png")
    tree = list_files(str(tmp_path), "input", Storage(str(tmp_path / "results")))
    assert list(tree.files) == ["results-2/b.png"]


def test_an_input_that_is_the_folder_of_the_results_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds neither .*but what is left out \(1: in the folder of the results\)"):
        list_parts(str(tmp_path), 10, Storage(str(tmp_path)))
