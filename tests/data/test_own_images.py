"""Images of one's own: every kind gives the same rows, in memory and through Ray Data, and mistakes are named."""

import csv
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_images import CLASSES, KINDS, SHAPE, make_images, png, write_folders, write_npz, write_tars

from pipeline.data import image_rows, image_survey
from pipeline.data.config import DatasetConfig
from pipeline.data.image_containers import read_images
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_duplicates, find_images
from pipeline.data.ingest import ingest
from pipeline.data.labelled_images import list_images
from pipeline.data.preprocess import preprocess
from pipeline.data.rows import Rows, rows_digest
from pipeline.data.shards import read_rows
from pipeline.storage import Storage


def found(path: Path, **settings: Any) -> DatasetConfig:
    return find_images(DatasetConfig("files", path=str(path), **settings), str(path.parent / "runs"))


def expected_rows() -> dict[str, Rows]:
    """What every kind gives: rows numbered in order of class and name."""
    return {
        split: Rows.of(
            np.stack([image for *_, image in rows]),
            np.array([CLASSES.index(name) for name, *_ in rows], np.int32),
        )
        for split, rows in make_images().items()
    }


def ingested_rows(manifest: dict[str, Any], split: str, storage: Storage) -> Rows:
    files = [read_rows(entry, storage) for entry in manifest["files"][split]]
    parts = [np.concatenate([getattr(rows, name) for rows in files]) for name in ("row_ids", "images", "labels")]
    order = np.argsort(parts[0])
    return Rows(*(part[order] for part in parts))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "images")
    config, storage = found(tmp_path / "images"), Storage(str(tmp_path / "runs"))
    assert config.found is not None
    assert (config.found.kind, config.found.image_shape, config.found.num_classes) == (kind, SHAPE, 3)
    expected = {split: rows_digest(rows) for split, rows in expected_rows().items()}
    raw = load_files(config)
    assert raw.validation is not None
    in_memory = {"train": raw.train, "val": raw.validation, "test": raw.test}
    assert {split: rows_digest(rows) for split, rows in in_memory.items()} == expected
    manifest = ingest(config, storage, "ingested")
    assert manifest["label_names"] == list(CLASSES)
    assert (manifest["corrupt"], manifest["duplicates"]) == ([], {})
    ready = preprocess(replace(config, num_shards=2), manifest, storage, "ready")
    digests = {split: described["digest"] for split, described in ready["splits"].items()}
    assert digests == {"train": expected["train"], "validation": expected["val"], "test": expected["test"]}
    assert ready["decoding"]["resize"] is None, "none was fitted, so a model of these takes no other sizes"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_held_out_keep_their_images(kind: str, tmp_path: Path) -> None:
    """The rows of a file that stay in `train` then do not follow each other."""
    KINDS[kind](tmp_path / "images")
    for path in sorted((tmp_path / "images").rglob("*"), reverse=True):
        if path.name == "metadata.csv":
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if not line.strip().endswith((",val", ",test"))))
        elif any(word in str(path.relative_to(tmp_path)) for word in ("val", "test")):
            path.rmdir() if path.is_dir() else path.unlink()
    config, storage = found(tmp_path / "images", test_fraction=0.3), Storage(str(tmp_path / "runs"))
    raw, all_rows = load_files(config), expected_rows()["train"]
    label_of = {image.tobytes(): label for image, label in zip(all_rows.images, all_rows.labels, strict=True)}
    for split, count in (("train", 30), ("test", 12)):
        rows = ingested_rows(ingest(config, storage, "ingested"), split, storage)
        assert rows_digest(rows) == rows_digest(raw.test if split == "test" else raw.train)
        assert len(rows) == count
        assert [label_of.pop(image.tobytes()) for image in rows.images] == rows.labels.tolist()
    assert label_of == {}


def test_splits_that_the_source_lacks_are_taken_by_the_settings(tmp_path: Path) -> None:
    write_folders(tmp_path / "all")
    shutil.copytree(tmp_path / "all" / "train", tmp_path / "images")
    config = found(tmp_path / "images", test_fraction=0.5)
    raw, again, other = load_files(config), load_files(config), load_files(replace(config, seed=1))
    assert raw.validation is None
    assert [np.bincount(rows.labels).tolist() for rows in (raw.train, raw.test)] == [[7, 7, 7], [7, 7, 7]]
    assert rows_digest(raw.test) == rows_digest(again.test) != rows_digest(other.test)
    together = np.concatenate([raw.train.images, raw.test.images]).reshape(42, -1)
    assert len(np.unique(together, axis=0)) == 42
    lacks_test = tmp_path / "lacks test"
    shutil.copytree(tmp_path / "all", lacks_test)
    shutil.rmtree(lacks_test / "test")
    (lacks_test / "val").rename(lacks_test / "Dev")
    config = found(lacks_test)
    assert config.found is not None
    assert (config.found.train_rows, config.found.validation_rows, config.found.test_rows) == (42, 9, 0)


@pytest.mark.usefixtures("ray_cluster")
def test_files_that_prove_corrupt_when_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their headers are whole: they are found by `ingest`, counted, and leave no gap among the row ids."""
    write_folders(tmp_path / "images")
    for name in ("train/cat/train03.png", "train/newt/train13.png"):
        path = tmp_path / "images" / name
        path.write_bytes(path.read_bytes()[:-40])
    config, storage = found(tmp_path / "images"), Storage(str(tmp_path / "runs"))
    with pytest.raises(ValueError, match=r"max_corrupt = 0: 2 of 60 .* first train/cat/train03\.png, which cannot"):
        ingest(config, storage, "refused")
    with (tmp_path / "runs" / "refused" / "corrupt.csv").open(newline="") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["train/cat/train03.png", "train/newt/train13.png"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"max_corrupt = 1: 2 of 60 .* the list is in {tmp_path}/corrupt.csv"):
        load_files(replace(config, max_corrupt=1))
    for path in (tmp_path / "images" / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no image of validation can be used"):
        load_files(found(tmp_path / "images", max_corrupt=11))
    shutil.rmtree(tmp_path / "images" / "val")
    (tmp_path / "images" / "outside.png").write_bytes(b"")
    (tmp_path / "images" / "train" / "cat" / "notes.txt").write_text("of the photographer")
    config, said = found(tmp_path / "images", max_corrupt=2), list[str]()
    manifest = ingest(config, storage, "ingested", said.append)
    assert [name for name, _ in manifest["corrupt"]] == ["train/cat/train03.png", "train/newt/train13.png"]
    rows = ingested_rows(manifest, "train", storage)
    assert rows.row_ids.tolist() == list(range(40))
    assert rows_digest(rows) == rows_digest(load_files(config).train)
    assert said == [
        "2 files left out (--dry-run names some): 1: file of another kind (.txt); "
        "1: image outside of the folders of classes",
        "warning: 2 of 51 images are left out, since they cannot be decoded",
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_image_in_two_splits_is_a_warning(tmp_path: Path) -> None:
    write_folders(tmp_path / "images")
    shutil.copy(tmp_path / "images/train/cat/train00.png", tmp_path / "images/test/cat/again.png")
    shutil.copy(tmp_path / "images/train/dog/train05.png", tmp_path / "images/val/cat/again.png")
    expected = {"train and validation": 1, "train and test": 1}
    assert find_duplicates(list_images(str(tmp_path / "images"))) == expected
    said: list[str] = []
    manifest = ingest(found(tmp_path / "images"), Storage(str(tmp_path / "runs")), "ingested", said.append)
    assert manifest["duplicates"] == expected
    assert said[0] == "warning: 1 images are the same in train and validation"


def test_the_headers_of_a_listing_are_read_once(tmp_path: Path) -> None:
    """Files with other bytes and the same names, sizes and times are not opened again; a changed one is."""
    write_folders(tmp_path / "images")
    first = found(tmp_path / "images")
    path = tmp_path / "images" / "train" / "cat" / "train03.png"
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    image_survey._READ.clear()  # as in a new process
    assert found(tmp_path / "images") == first
    image_survey._READ.clear()
    (survey,) = (tmp_path / "runs" / image_survey.SURVEYS).iterdir()
    survey.write_text(survey.read_text()[:50])  # cut off
    with pytest.raises(ValueError, match=r"max_corrupt = 0: 1 of 60 images .* train/cat/train03\.png"):
        found(tmp_path / "images")
    with pytest.raises(ValueError, match=r"max_corrupt = 0: 1 of 60 images"):  # by the survey that was written again
        found(tmp_path / "images")
    write_folders(tmp_path / "images")
    os.utime(path, ns=(0, 0))
    again = found(tmp_path / "images")
    assert again.fingerprint != first.fingerprint
    assert len(list((tmp_path / "runs" / image_survey.SURVEYS).iterdir())) == 2


@pytest.mark.parametrize("name", ["train-1.tar.gz", "train-1.tgz", "train-1.TAR.zst"])
def test_a_compressed_tar_is_refused_alone_and_beside_others(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is a compressed tar, .* unpack it to a \.tar"):
        list_images(str(tmp_path / "images"))
    shutil.rmtree(tmp_path / "images")
    write_tars(tmp_path / "images")
    (tmp_path / "images" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is a compressed tar"):
        list_images(str(tmp_path / "images"))


def test_an_input_is_known_by_names_sizes_and_times_or_by_its_content(tmp_path: Path) -> None:
    write_folders(tmp_path / "images")
    config = found(tmp_path / "images")
    assert config.fingerprint == found(tmp_path / "images").fingerprint
    with pytest.raises(ValueError, match=r"have the SHA-256 ([0-9a-f]{64})") as caught:
        found(tmp_path / "images", sha256="0" * 64)
    sha256 = str(caught.value).partition("have the SHA-256 ")[2][:64]
    assert found(tmp_path / "images", sha256=sha256).fingerprint is None
    os.utime(tmp_path / "images" / "train" / "cat" / "train00.png", (1, 1))
    assert config.fingerprint != found(tmp_path / "images").fingerprint
    assert found(tmp_path / "images", sha256=sha256).fingerprint is None, "the times are not part of the content"
    with pytest.raises(ValueError, match="has changed since it was listed: give the command again"):
        load_files(config)
    (tmp_path / "images" / "train" / "cat" / "new.png").write_bytes(png(np.zeros(SHAPE, np.uint8)))
    with pytest.raises(ValueError, match=rf"data\.sha256 = '{sha256}'"):
        found(tmp_path / "images", sha256=sha256)


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where their size stays and the content is pinned, which was hashed before."""
    write_npz(tmp_path / "images")
    with pytest.raises(ValueError, match=r"have the SHA-256 ([0-9a-f]{64})") as caught:
        found(tmp_path / "images", sha256="0" * 64)
    config = found(tmp_path / "images", sha256=str(caught.value).partition("have the SHA-256 ")[2][:64])

    def overtaken(*arguments: Any) -> Iterator[Any]:
        os.utime(tmp_path / "images" / "train.npz", (1, 1))
        return read_images(*arguments)

    monkeypatch.setattr(image_rows, "read_images", overtaken)
    with pytest.raises(ValueError, match=r"train.npz has changed while the files were read: give the command again"):
        load_files(config)
