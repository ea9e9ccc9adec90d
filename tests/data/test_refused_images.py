"""Images of one's own that cannot be used: the message names what it is."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import png, write_folders, write_metadata, write_npz, write_tars

from pipeline.data.config import DatasetConfig
from pipeline.data.image_survey import find_images
from pipeline.data.labelled_images import list_images


def found(path: Path, **settings: Any) -> DatasetConfig:
    return find_images(DatasetConfig("files", path=str(path), **settings), str(path.parent / "runs"))


def drop_train_cats(root: Path) -> None:
    shutil.rmtree(root / "train" / "cat")


def make_one_grey(root: Path) -> None:
    from PIL import Image

    Image.new("L", (6, 6)).save(root / "train" / "cat" / "grey.png")


def make_one_larger(root: Path) -> None:
    (root / "train" / "cat" / "large.png").write_bytes(png(np.zeros((7, 9, 3), np.uint8)))


def rename_train_to_cats(root: Path) -> None:
    (root / "train").rename(root / "cats")
    shutil.rmtree(root / "val")


def turn_inside_out(root: Path) -> None:
    """cat/train instead of train/cat."""
    for folder in sorted(root.glob("*/*")):
        (root / folder.name).mkdir(exist_ok=True)
        folder.rename(root / folder.name / folder.parent.name)
    for split in ("train", "val", "test"):
        (root / split).rmdir()


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    for name in ("train", "bus/long/test"):  # CIFAR-100 has a class `train`
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((6, 6, 3), 9 * number + len(name), np.uint8)
            (tmp_path / "images" / name / f"{number}.png").write_bytes(png(pixels))
    listing = list_images(str(tmp_path / "images"))
    assert listing.label_names == ["bus", "train"]
    assert set(listing.splits) == {"train"}


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (
            write_folders,
            drop_train_cats,
            "1 classes have images in validation and none in train, such as cat: add them",
        ),
        (write_folders, lambda root: (root / "train" / "owl").mkdir(), "the folder train/owl has no images: fill"),
        (
            write_folders,
            lambda root: (root / "train").rename(root / "test2"),
            "holds the splits test, val and also test2",
        ),
        (
            write_folders,
            rename_train_to_cats,
            "holds the splits test and also cats: move the other folders away",
        ),
        (
            write_folders,
            turn_inside_out,
            "has a split in the folder of a class, cat/test, where it would not count: move it to test/cat, and",
        ),
        (
            write_metadata,
            lambda root: (root / "metadata.csv").rename(root / "metadata.jsonl"),
            "or write metadata.csv with file_name and label; metadata.jsonl is not read",
        ),
        (write_folders, lambda root: shutil.rmtree(root / "train"), "has no images in train/, but in validation"),
        (
            write_folders,
            make_one_grey,
            r"data\.channels = None: 1 images are grey and 60 in colour: give --data\.channels 3",
        ),
        (
            write_folders,
            make_one_larger,
            "the images are of 2 sizes from 6 x 6 to 9 x 7, median 6 x 6: give --data.image-size",
        ),
        (write_folders, shutil.rmtree, "no such file or folder"),
        (write_metadata, lambda root: (root / "cat-val00.png").unlink(), "line 44: 'cat-val00.png' is not among"),
        (
            write_metadata,
            lambda root: (root / "metadata.csv").write_text("file_name\nx.png\n"),
            "metadata.csv has no column label, but .*: it must have",
        ),
        (
            write_metadata,
            lambda root: (root / "metadata.csv").write_text("file_name,label,split\ncat-val00.png,cat,mine\n"),
            "line 2: 'cat-val00.png' has the split 'mine', which is none of train",
        ),
        (
            write_metadata,
            lambda root: (root / "metadata.csv").unlink(),
            "holds 60 images, but in no folders of classes",
        ),
        (
            write_tars,
            lambda root: (root / "test-000000.tar").write_bytes(b"x" * 600),
            "test-000000.tar is no whole tar",
        ),
        (
            write_npz,
            lambda root: np.savez(root / "train.npz", images=np.zeros((2, 6, 6), np.uint8), labels=np.array([0, 2])),
            "some labels are numbers and some are text",
        ),
        (
            write_npz,
            lambda root: np.savez(root / "train.npz", images=np.zeros((2, 6, 6)), labels=["cat", "dog"]),
            r"expected images uint8 \(N, H, W\)",
        ),
    ],
)
def test_what_cannot_be_used_is_named(
    write: Callable[[Path], None], change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "images")
    change(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        found(tmp_path / "images")


def test_labels_with_a_gap(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", images=np.zeros((4, 6, 6), np.uint8), labels=np.array([0, 1, 1, 3]))
    with pytest.raises(ValueError, match="1 of 4 classes have no images, such as 2: add them, or number the others"):
        found(tmp_path / "one.npz")
    np.savez(tmp_path / "one.npz", images=np.zeros((4, 6, 6), np.uint8), labels=np.array([0, -1, 1, 3]))
    with pytest.raises(ValueError, match="labels are from -1 to 3"):
        found(tmp_path / "one.npz")


def test_a_column_that_would_be_unpickled_is_refused_by_its_type(tmp_path: Path) -> None:
    from ray.data.extensions import ArrowPythonObjectArray

    marker = tmp_path / "was run"

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch '{marker}'",)

    (tmp_path / "images").mkdir()
    table = pa.table({"image": ArrowPythonObjectArray.from_objects([Trap(), Trap()]), "label": [0, 1]})
    pq.write_table(table, tmp_path / "images" / "train.parquet")
    with pytest.raises(ValueError, match="has no column `image` of encoded images"):
        found(tmp_path / "images")
    assert not marker.exists()
