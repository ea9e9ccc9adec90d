"""Splits that folders, tables and settings give, and keys of tars: no row goes where nobody put it, or gets lost."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from own_images import png

from pipeline.data.collected_images import alike_but_for_case
from pipeline.data.labelled_images import list_images
from pipeline.data.rows import stratified_split

IMAGE = png(np.zeros((6, 6, 3), np.uint8))


def splits(folder: Path, table: str, names: list[str], place: str = "") -> dict[str, list[str]]:
    """The images of each split, of a folder with these images and a table at `place`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGE)
    (folder / place / "metadata.csv").write_text(table)
    return {split: list(rows.names) for split, rows in list_images(str(folder)).splits.items()}


def test_a_table_without_splits_takes_those_of_the_folders(tmp_path: Path) -> None:
    names = ["train/1.png", "train/2.png", "test/3.png", "val/4.png"]
    table = "file_name,label\n" + "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    expected = {"train": names[:2], "validation": names[3:], "test": names[2:3]}
    assert splits(tmp_path / "a", table, names) == expected
    within = [f"data/{name}" for name in names]
    found = splits(tmp_path / "b", table, within, "data")
    assert found == {split: [f"data/{name}" for name in own] for split, own in expected.items()}
    of_table = splits(
        tmp_path / "c", "file_name,label\n1.png,a\n2.png,b\n", ["data/train/1.png", "data/train/2.png"], "data/train"
    )
    assert of_table == {"train": ["data/train/1.png", "data/train/2.png"]}
    flat = splits(tmp_path / "d", "file_name,label\na/1.png,a\nb/2.png,b\n", ["a/1.png", "b/2.png"])
    assert flat == {"train": ["a/1.png", "b/2.png"]}


def test_a_table_whose_images_lie_in_folders_of_splits_and_beside_is_refused(tmp_path: Path) -> None:
    table = "file_name,label\ntest/1.png,a\nmore/2.png,b\n"
    with pytest.raises(
        ValueError, match=r"lists test/1.png in the folder of a split and more/2.png in none: add a col"
    ):
        splits(tmp_path, table, ["test/1.png", "more/2.png"])


@pytest.mark.parametrize(
    ("names", "place"),
    [(["train/cat/1.png", "test/cat/2.png"], "train/cat"), (["images/train/1.png", "images/Test/2.png"], "")],
)
def test_a_split_above_or_below_that_would_not_count_is_refused(names: list[str], place: str, tmp_path: Path) -> None:
    table = "file_name,label\n" + "".join(f"{name.removeprefix(f'{place}/')},a\n" for name in names[: 2 - bool(place)])
    message = r"/1.png lies in the folder train of a split, which would not count: add a column split to .*metadata.csv"
    with pytest.raises(ValueError, match=message):
        splits(tmp_path, table, names, place)


def test_a_row_without_a_split_among_others_is_named_by_its_line(tmp_path: Path) -> None:
    table = 'file_name,label,split,note\n1.png,a,train,"two\nlines"\n\n2.png,b,,x\n'
    with pytest.raises(ValueError, match=r"metadata.csv, line 5: '2.png' has no split, and others have: mend the line"):
        splits(tmp_path, table, ["1.png", "2.png"])


@pytest.mark.parametrize("name", ["/etc/1.png", "../1.png", "a/../1.png", "a\\1.png", "1.PNG", "1.png "])
def test_a_table_names_only_images_that_are_below_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: .* is not among the images: mend the line"):
        splits(tmp_path / "own", f"file_name,label\n{name},a\n", ["1.png", "a/2.png"])


def test_classes_that_differ_in_case_are_two_and_a_warning() -> None:
    assert alike_but_for_case(["cat", "dog"]) is None
    said = alike_but_for_case(["Cat", "cat", "A", "a", "dog"])
    assert said is not None
    assert said.startswith(
        "warning: the classes 'Cat' and 'cat' differ in upper and lower case alone, and so do 1 others:"
    )


def test_a_table_of_one_split_alone_is_refused(tmp_path: Path) -> None:
    names = ["train/a/1.png", "train/b/2.png", "test/a/3.png"]
    with pytest.raises(ValueError, match=r"train/metadata.csv lists no image of test/, and no other metadata.csv does"):
        splits(tmp_path, "file_name,label\na/1.png,a\nb/2.png,b\n", names, "train")


def test_the_name_of_a_table_may_have_capitals(tmp_path: Path) -> None:
    splits(tmp_path, "file_name,label\na/1.png,x\nb/2.png,y\n", ["a/1.png", "b/2.png"])
    (tmp_path / "metadata.csv").rename(tmp_path / "Metadata.CSV")
    assert list_images(str(tmp_path)).label_names == ["x", "y"]


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = IMAGE if not name.endswith(".cls") else str(len(name) % 2).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.png", "1.cls", "v2.0.png", "v2.0.cls"], r"x.tar: v2.0.png has a dot in its key, .* name them without"),
        (["1.png", "1.cls", "1.cls"], r"x.tar has two 1.cls: write each key once"),
    ],
)
def test_keys_of_a_tar_that_are_not_what_they_seem(names: list[str], message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", names)
    with pytest.raises(ValueError, match=message):
        list_images(str(tmp_path / "x.tar"))


def test_another_image_of_a_key_is_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", ["1.png", "1.cls", "1.mask.png", "ab.png", "ab.cls"])
    listing = list_images(str(tmp_path / "x.tar"))
    assert len(listing.splits["train"]) == 2
    assert sum(map(len, listing.tree.left_out.values())) == 1


def test_folders_of_splits_in_a_tar_are_refused_unless_its_name_says_the_split(tmp_path: Path) -> None:
    names = ["test/ab.png", "test/ab.cls", "train/1.png", "train/1.cls"]
    write_tar(tmp_path / "x.tar", names)
    message = r"x.tar:test/ab.png lies in the folder test of a split, .* such as train-0.tar"
    with pytest.raises(ValueError, match=message):
        list_images(str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").rename(tmp_path / "train-0.tar")
    assert len(list_images(str(tmp_path / "train-0.tar")).splits["train"]) == 2


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_tar_is_no_image_that_vanishes(kind: bytes, tmp_path: Path) -> None:
    """GNU tar writes the second name of a file as a link, also where `cp -l` has made it to repeat a rare class."""
    write_tar(tmp_path / "x.tar", ["1.png", "1.cls", ".hidden.png"])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        member = tarfile.TarInfo("2.png")
        member.type, member.linkname = kind, "1.png"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"x.tar:2.png is a link to 1.png and not a file: write the tar with --deref"):
        list_images(str(tmp_path / "x.tar"))


def test_what_is_no_file_in_a_tar_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", ["1.png", "1.cls", "a/.2.png"])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for kind, name in ((tarfile.DIRTYPE, "a"), (tarfile.FIFOTYPE, "pipe.png")):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
    assert list_images(str(tmp_path / "x.tar")).tree.left_out == {
        "hidden member of a tar": ["x.tar:a/.2.png"],
        "member of a tar that is no file": ["x.tar:pipe.png"],
    }


@pytest.mark.parametrize("others", [np.array(["light", "dark"]), None])
def test_npz_files_whose_classes_have_other_names_are_refused(others: np.ndarray | None, tmp_path: Path) -> None:
    for name, label_names in (("train", np.array(["dark", "light"])), ("test", others)):
        arrays = {"images": np.zeros((2, 6, 6), np.uint8), "labels": np.array([0, 1])}
        if label_names is not None:
            arrays["label_names"] = label_names
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"train.npz has other names of classes than test.npz: write them alike"):
        list_images(str(tmp_path))


def test_a_class_keeps_a_row_for_training() -> None:
    labels = np.array([0] * 10 + [1, 2, 2])
    kept, held_out = stratified_split(labels, 0.4, seed=0)
    assert np.bincount(labels[kept]).tolist() == [6, 1, 1]
    assert np.bincount(labels[held_out], minlength=3).tolist() == [4, 0, 1]
    with pytest.raises(ValueError, match=r"data.test_fraction = 0.6 takes all 1 rows of the class with the number 1"):
        stratified_split(labels, 0.6, seed=0, split="test")
    assert len(stratified_split(labels, 0.6, seed=0, every_class=False)[1]) == 8


def test_a_split_of_many_classes_is_made_in_one_pass() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100_000, dtype=np.int32), 5))
    kept, held_out = stratified_split(labels, 0.2, seed=0)  # a pass for each class would take minutes
    assert np.bincount(labels[kept]).tolist() == [4] * 100_000
    assert np.bincount(labels[held_out]).tolist() == [1] * 100_000
