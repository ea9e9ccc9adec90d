"""Images of one's own with classes of classes, from a column of Parquet files or of `metadata.csv`."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import CLASSES, make_images, png

from pipeline.data.config import DatasetConfig
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_images
from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.data.rows import rows_digest
from pipeline.storage import Storage

COARSE = {"cat": "mammal", "dog": "mammal", "newt": "amphibian"}
NAMES = ["amphibian", "mammal"]


def write_parquet(root: Path) -> None:
    """With names in the schema, in another order than that of the alphabet."""
    root.mkdir()
    features = {"label": {"names": list(CLASSES)}, "coarse_label": {"names": NAMES[::-1]}}
    for split, rows in make_images().items():
        table = pa.table(
            {
                "image": [png(image) for *_, image in rows],
                "label": [CLASSES.index(name) for name, *_ in rows],
                "coarse_label": [NAMES[::-1].index(COARSE[name]) for name, *_ in rows],
            }
        )
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"{split}.parquet")


def write_metadata(root: Path, coarse_of: Callable[[str, str], str] = lambda name, key: COARSE[name]) -> None:
    root.mkdir()
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "label", "coarse_label", "split"))
        for split, rows in make_images().items():
            for name, key, image in rows:
                (root / f"{name}-{key}.png").write_bytes(png(image))
                table.writerow((f"{name}-{key}.png", name, coarse_of(name, key), split))


def found(root: Path) -> DatasetConfig:
    return find_images(DatasetConfig("files", path=str(root)), str(root.parent / "runs"))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("write", "names"), [(write_parquet, NAMES[::-1]), (write_metadata, NAMES)])
def test_a_column_gives_each_row_its_coarse_label(
    write: Callable[[Path], None], names: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "images")
    config, storage = found(tmp_path / "images"), Storage(str(tmp_path / "runs"))
    raw = load_files(config)
    assert raw.coarse_label_names == names
    for rows in (raw.train, raw.test):
        assert rows.coarse_labels is not None
        assert [names[coarse] for coarse in rows.coarse_labels] == [COARSE[CLASSES[label]] for label in rows.labels]
    manifest = preprocess(config, ingest(config, storage, "ingested"), storage, "ready")
    assert manifest["coarse_label_names"] == names
    assert manifest["splits"]["train"]["digest"] == rows_digest(raw.train)
    assert manifest["splits"]["test"]["digest"] == rows_digest(raw.test)


@pytest.mark.parametrize(
    ("coarse_of", "message"),
    [
        (
            lambda name, key: "fish" if key == "train03" else COARSE[name],
            "'cat' has the coarse label 'fish', and others have 'mammal': give all images of a class the same",
        ),
        (lambda name, key: "" if key == "train03" else COARSE[name], "line 5: 'cat-train03.png' has no coarse label"),
    ],
)
def test_a_class_without_one_coarse_class_is_named(
    coarse_of: Callable[[str, str], str], message: str, tmp_path: Path
) -> None:
    write_metadata(tmp_path / "images", coarse_of)
    with pytest.raises(ValueError, match=message):
        found(tmp_path / "images")


def test_a_file_without_the_column_among_others_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "images")
    table = pq.read_table(tmp_path / "images" / "train.parquet")
    label = table["label"].to_numpy()
    with_column, without = table.filter(label < 2), table.filter(label == 2).drop_columns("coarse_label")
    for split in ("val", "test"):
        (tmp_path / "images" / f"{split}.parquet").unlink()
    for metadata, message in (
        (table.schema.metadata, r"train\.parquet has other names of classes than train-2\.parquet"),
        (None, "the class 2 has no coarse label, and others have"),
    ):
        pq.write_table(with_column.replace_schema_metadata(metadata), tmp_path / "images" / "train.parquet")
        pq.write_table(without.replace_schema_metadata(metadata), tmp_path / "images" / "train-2.parquet")
        with pytest.raises(ValueError, match=message):
            found(tmp_path / "images")


def test_labels_of_the_classes_stay_as_they_are_without_the_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "images")
    with_column = load_files(found(tmp_path / "images"))
    for path in (tmp_path / "images").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("coarse_label"), path)
    without = load_files(found(tmp_path / "images"))
    assert without.coarse_label_names is None
    assert without.train.coarse_labels is None
    np.testing.assert_array_equal(without.train.labels, with_column.train.labels)
