"""Copies of CIFAR-100 that differ in one pixel or in one label have other digests; for digits see test_preprocess."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.config import DatasetConfig
from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.data.rows import Rows
from pipeline.data.shards import write_rows
from pipeline.storage import Storage

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]
ROW = 40


def corrupted(ingested: dict[str, Any], split: str, what: str, storage: Storage) -> dict[str, Any]:
    """`ingested` with the first file of `split` replaced by one in which a single value of row `ROW` is another."""
    first, *others = ingested["files"][split]
    table = pq.read_table(pa.BufferReader(storage.read_bytes(first["path"])))
    images = table["image"].combine_chunks().to_numpy_ndarray().copy()
    labels, coarse = (table[name].to_numpy().copy() for name in ("label", "coarse_label"))
    if what == "pixel":
        images[ROW, 31, 0, 2] ^= 1
    else:
        labels[ROW] = (labels[ROW] + 1) % 100
    path = f"corrupted/{split}-{what}.parquet"
    sha256 = write_rows(Rows(table["row_id"].to_numpy(), images, labels, coarse), storage, path)["sha256"]
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
    assert digests["label of test"] == whole | {"test": digests["label of test"]["test"]}
    assert digests["label of test"]["test"] != whole["test"]
    changed = [part for part in whole if digests["pixel of train"][part] != whole[part]]
    assert changed in (["train"], ["validation"]), "the split in which the row is"
    assert np.sum(manifests["label of test"]["splits"]["test"]["class_counts"]) == 10_000
