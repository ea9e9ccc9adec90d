"""Copies of CIFAR-100 that differ in one pixel or in one label have other digests; for digits see test_preprocess."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.config import DatasetConfig
from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.data.rows import Rows
from pipeline.data.shards import read_rows, write_rows
from pipeline.storage import Storage

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]
ROW = 40


def corrupted(ingested: dict[str, Any], split: str, what: str, storage: Storage) -> dict[str, Any]:
    """`ingested` with the first file of `split` replaced by one in which a single value of row `ROW` is another."""
    first, *others = ingested["files"][split]
    read = read_rows(first, storage)
    images, labels = read.images.copy(), read.labels.copy()
    if what == "pixel":
        images[ROW, 31, 0, 2] ^= 1
    else:
        labels[ROW] = (labels[ROW] + 1) % 100
    path = f"corrupted/{split}-{what}.parquet"
    sha256 = write_rows(Rows(read.row_ids, images, labels, read.coarse_labels), storage, path)["sha256"]
    return ingested | {"files": ingested["files"] | {split: [first | {"path": path, "sha256": sha256}, *others]}}


def test_a_pixel_or_a_label_changes_the_digest(cifar100_archive: tuple[Path, str], tmp_path: Path) -> None:
    path, sha256 = cifar100_archive
    config, storage = DatasetConfig(archive=str(path), sha256=sha256), Storage(str(tmp_path))
    ingested = ingest(config, storage, "ingested")
    copies = {"as it is": ingested}
    copies |= {
        f"{what} of {split}": corrupted(ingested, split, what, storage)
        for split, what in (("train", "pixel"), ("test", "label"))
    }
    manifests = {name: preprocess(config, copy, storage, name) for name, copy in copies.items()}
    assert len({manifest["digest"] for manifest in manifests.values()}) == 3
    digests = {name: {part: s["digest"] for part, s in m["splits"].items()} for name, m in manifests.items()}
    whole = digests["as it is"]
    # That of earlier versions.
    assert manifests["as it is"]["digest"] == "14ebc9fcb6b237c1ef4741db94127fae95021c508905fa65c604ebcd30ab8adb"
    assert digests["label of test"] == whole | {"test": digests["label of test"]["test"]}
    assert digests["label of test"]["test"] != whole["test"]
    changed = [part for part in whole if digests["pixel of train"][part] != whole[part]]
    assert changed in (["train"], ["validation"]), "the split in which the row is"
    assert np.sum(manifests["label of test"]["splits"]["test"]["class_counts"]) == 10_000
