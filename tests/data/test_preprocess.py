"""Preprocessing on a real local Ray: the written rows are exact, and they are verified when they are read."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.data import shards as shard_files
from pipeline.data.config import DatasetConfig
from pipeline.data.ingest import ingest, load
from pipeline.data.preprocess import preprocess
from pipeline.data.ray_rows import CorruptShardError, materialize_split, read_split, to_rows
from pipeline.data.rows import Rows, stratified_split
from pipeline.data.shards import read_rows, write_rows
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")
DIGITS = DatasetConfig(source="digits", validation_fraction=0.1, num_shards=16, seed=1)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def ingested(storage: Storage, ray_cluster: None) -> dict[str, Any]:
    return ingest(DIGITS, storage, "ingested")


@pytest.fixture(scope="module")
def manifest(storage: Storage, ingested: dict[str, Any]) -> dict[str, Any]:
    return preprocess(DIGITS, ingested, storage, "first")


def digests(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: split["digest"] for name, split in manifest["splits"].items()}


def shard_sums(manifest: dict[str, Any]) -> list[str]:
    return [shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]]


def changed_copy(ingested: dict[str, Any], storage: Storage, name: str, change: Any) -> dict[str, Any]:
    """`ingested` with the first training file replaced by one whose arrays `change` has changed."""
    read = read_rows(ingested["files"]["train"][0], storage)
    images, labels = read.images.copy(), read.labels.copy()
    rows = change(Rows.of(images, labels)) or Rows.of(images, labels)
    entry = write_rows(rows, storage, name)
    files = [entry, *ingested["files"]["train"][1:]]
    return ingested | {"files": ingested["files"] | {"train": files}}


def test_every_row_of_the_source_is_in_exactly_one_split(storage: Storage, manifest: dict[str, Any]) -> None:
    raw = load(DIGITS)
    arrays = {split: to_rows(read_split(manifest, split, storage)) for split in manifest["splits"]}
    for split, source in (("train", raw.train), ("validation", raw.train), ("test", raw.test)):
        rows = arrays[split]
        assert rows.images.dtype == np.uint8
        assert rows.labels.dtype == np.int32
        np.testing.assert_array_equal(rows.images, source.images[rows.row_ids])
        np.testing.assert_array_equal(rows.labels, source.labels[rows.row_ids])
        assert manifest["splits"][split]["rows"] == len(rows.labels)
        assert manifest["splits"][split]["class_counts"] == np.bincount(rows.labels, minlength=10).tolist()
    both = np.concatenate([arrays["train"].row_ids, arrays["validation"].row_ids])
    np.testing.assert_array_equal(np.sort(both), np.arange(len(raw.train.labels)))
    np.testing.assert_array_equal(arrays["test"].row_ids, np.arange(len(raw.test.labels)))


def test_shards_of_validation_rows_are_small() -> None:
    row = 64 * 64 * 3
    assert shard_files.shard_count(7000, 4, row) == 6, "16 MiB each"
    most = shard_files.MOST_VALIDATION_SHARD_BYTES
    assert shard_files.shard_count(7000, 4, row, most) == 21, "4 MiB each: a worker holds some beside its window"
    assert shard_files.shard_count(5000, 4, 32 * 32 * 3, most) == 4, "CIFAR-100 keeps its files"
    assert shard_files.shard_count(3, 4, row) == 3


def test_the_validation_split_takes_the_same_share_of_every_class(manifest: dict[str, Any]) -> None:
    counts = np.bincount(load(DIGITS).train.labels)
    assert manifest["splits"]["validation"]["class_counts"] == [round(0.1 * count) for count in counts.tolist()]


def test_stratified_split_is_seeded_and_refuses_an_empty_part() -> None:
    labels = np.repeat(np.arange(5, dtype=np.int32), 20)
    train, validation = stratified_split(labels, 0.25, seed=0)
    assert np.bincount(labels[validation]).tolist() == [5] * 5
    np.testing.assert_array_equal(np.union1d(train, validation), np.arange(100))
    np.testing.assert_array_equal(validation, stratified_split(labels, 0.25, seed=0)[1])
    assert not np.array_equal(validation, stratified_split(labels, 0.25, seed=1)[1])
    with pytest.raises(ValueError, match=r"data.validation_fraction = 0.01 of 100 rows leaves 100 .* and 0 "):
        stratified_split(labels, 0.01, seed=0)


def test_pixel_statistics_are_those_of_the_training_rows(storage: Storage, manifest: dict[str, Any]) -> None:
    pixels = to_rows(read_split(manifest, "train", storage)).images / 255
    np.testing.assert_allclose(manifest["pixel_mean"], pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest["pixel_std"], pixels.std((0, 1, 2)), rtol=1e-12)


def test_the_manifest_is_json_and_its_files_are_plain_parquet(storage: Storage, manifest: dict[str, Any]) -> None:
    assert json.loads(json.dumps(manifest)) == manifest
    assert (manifest["image_shape"], manifest["num_classes"]) == ([8, 8, 1], 10)
    assert manifest["label_names"] == list("0123456789")
    assert manifest["coarse_label_names"] is None
    train = manifest["splits"]["train"]["shards"]
    assert len(train) == 16
    assert max(s["rows"] for s in train) - min(s["rows"] for s in train) <= 1
    table = pq.read_table(storage.fs_path(train[3]["path"]), filesystem=storage.filesystem)
    assert table.num_rows == train[3]["rows"]
    assert table.schema.names == ["row_id", "image", "label"]
    assert table.schema.field("image").type == pa.binary(64)
    assert table.schema.metadata[b"image_shape"] == b"[8, 8, 1]"
    assert not (np.diff(table["row_id"].to_numpy()) > 0).all(), "rows are shuffled"


def test_the_digest_is_that_of_earlier_versions(manifest: dict[str, Any]) -> None:
    assert manifest["digest"] == "963bf1f569d1d76830831034445ca14afeb20c17ee4918f41c90cb0803055d3e"


def test_shards_of_earlier_versions_are_read(storage: Storage) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    columns = {
        "row_id": pa.array(np.arange(7)),
        "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
        "label": pa.array(np.arange(7, dtype=np.int32)),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    old = storage.write_verified("old.parquet", sink.getvalue().to_pybytes()) | {"rows": 7}
    new = write_rows(Rows.of(images, np.arange(7, dtype=np.int32)), storage, "new.parquet")
    for rows in (read_rows(old, storage), read_rows(new, storage)):
        np.testing.assert_array_equal(rows.images, images)
        np.testing.assert_array_equal(rows.labels, np.arange(7))
    assert storage.read_bytes("new.parquet").count(images.tobytes()) == 1, "pixels as they are: none is encoded"


def test_the_same_settings_give_the_same_bytes(storage: Storage, ingested: dict, manifest: dict[str, Any]) -> None:
    again = preprocess(DIGITS, ingest(DIGITS, storage, "ingested again"), storage, "again")
    assert shard_sums(again) == shard_sums(manifest)
    assert again["digest"] == manifest["digest"]
    other = preprocess(replace(DIGITS, seed=2), ingested, storage, "other seed")
    assert digests(other)["train"] != digests(manifest)["train"]


def test_the_digest_does_not_depend_on_the_number_of_shards(
    storage: Storage, ingested: dict[str, Any], manifest: dict[str, Any]
) -> None:
    other = preprocess(replace(DIGITS, num_shards=3), ingested, storage, "three shards")
    assert len(other["splits"]["train"]["shards"]) == 3
    assert (other["digest"], digests(other)) == (manifest["digest"], digests(manifest))
    assert shard_sums(other)[:3] != shard_sums(manifest)[:3]


def test_no_shard_has_more_pixels_than_a_streaming_worker_is_to_hold(
    storage: Storage, ingested: dict[str, Any], manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "MOST_SHARD_BYTES", 64 * 50)
    other = preprocess(DIGITS, ingested, storage, "small shards")
    for split in other["splits"].values():
        assert 40 < max(shard["rows"] for shard in split["shards"]) <= 50 or len(split["shards"]) == 4
    assert (other["digest"], digests(other)) == (manifest["digest"], digests(manifest))


def test_one_pixel_or_one_label_changes_the_digest(
    storage: Storage, ingested: dict[str, Any], manifest: dict[str, Any]
) -> None:
    row = int(to_rows(read_split(manifest, "train", storage)).row_ids[0])

    def change_a_pixel(rows: Rows) -> None:
        rows.images[row, 3, 4, 0] ^= 1

    def swap_two_labels(rows: Rows) -> None:
        other = np.flatnonzero(rows.labels != rows.labels[0])[0]
        rows.labels[[0, other]] = rows.labels[[other, 0]]

    seen = {manifest["digest"]}
    for change in (change_a_pixel, swap_two_labels):
        copy = changed_copy(ingested, storage, f"{change.__name__}.parquet", change)
        seen.add(preprocess(DIGITS, copy, storage, change.__name__)["digest"])
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: Rows.of(rows.images[:, :7].copy(), rows.labels), "expected images of type"),
        (lambda rows: Rows.of(rows.images.astype(np.int16), rows.labels), "expected images of type"),
        (
            lambda rows: Rows.of(rows.images, rows.labels + 1),
            "expected label int32 from 0 to 9, found int32 from 1 to",
        ),
    ],
)
def test_rows_that_are_not_what_was_promised_stop_it(
    storage: Storage, ingested: dict[str, Any], change: Any, message: str
) -> None:
    copy = changed_copy(ingested, storage, "changed.parquet", change)
    with pytest.raises(ValueError, match=message):
        preprocess(DIGITS, copy, storage, "never")


def test_a_changed_or_missing_shard_is_named(storage: Storage, manifest: dict[str, Any]) -> None:
    shard = manifest["splits"]["test"]["shards"][2]
    data = storage.read_bytes(shard["path"])
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    try:
        storage.write_bytes(shard["path"], bytes(changed))
        with pytest.raises(CorruptShardError) as caught:
            materialize_split(manifest, "test", storage)
        assert type(caught.value) is CorruptShardError
        assert (caught.value.path, caught.value.expected) == (storage.absolute(shard["path"]), shard["sha256"])
        assert all(part in str(caught.value) for part in (shard["path"], shard["sha256"], "--force"))
        assert "\n" not in str(caught.value)
        with pytest.raises(CorruptShardError):
            read_split(manifest, "test", storage).materialize()
        with pytest.raises(CorruptShardError):
            to_rows(read_split(manifest, "test", storage))
        storage.delete(shard["path"])
        with pytest.raises(CorruptShardError, match=f"{shard['path']} is missing"):
            materialize_split(manifest, "test", storage)
    finally:
        storage.write_bytes(shard["path"], data)
    assert materialize_split(manifest, "test", storage).count() == manifest["splits"]["test"]["rows"]


def test_a_changed_ingested_file_is_named(storage: Storage, ingested: dict[str, Any]) -> None:
    copy = json.loads(json.dumps(ingested))
    copy["files"]["train"][0]["sha256"] = "0" * 64
    with pytest.raises(CorruptShardError, match=ingested["files"]["train"][0]["path"]):
        preprocess(DIGITS, copy, storage, "never")


def test_to_arrays_takes_an_iterator_too(storage: Storage, manifest: dict[str, Any]) -> None:
    rows = materialize_split(manifest, "validation", storage)
    whole = to_rows(rows)
    parts = [to_rows(part) for part in rows.streaming_split(1)]
    for part in (*parts, to_rows(rows.iterator())):
        assert isinstance(part, Rows)
        np.testing.assert_array_equal(part.row_ids, whole.row_ids)
        np.testing.assert_array_equal(part.images, whole.images)
        np.testing.assert_array_equal(part.labels, whole.labels)


@pytest.mark.slow  # 12 s; the tests above run the same code on fewer rows, and test_ingest.py the real archive
def test_the_real_archive(cifar100_archive: tuple[Path, str], tmp_path: Path) -> None:
    """50,000 rows in a task that holds no CPU, as the pipeline runs it."""
    path, sha256 = cifar100_archive
    config, storage = DatasetConfig(archive=str(path), sha256=sha256), Storage(str(tmp_path))

    @ray.remote(num_cpus=0)
    def run() -> tuple[dict[str, Any], float]:
        ingested = ingest(config, storage, "ingested")
        start = time.monotonic()
        return preprocess(config, ingested, storage, "preprocessed"), time.monotonic() - start

    manifest, seconds = ray.get(run.remote())
    counts = {name: (split["rows"], set(split["class_counts"])) for name, split in manifest["splits"].items()}
    assert counts == {"train": (45_000, {450}), "validation": (5_000, {50}), "test": (10_000, {100})}
    np.testing.assert_allclose(manifest["pixel_mean"], [0.507, 0.4865, 0.4409], atol=1e-3)
    assert len(manifest["coarse_label_names"]) == 20
    row = read_split(manifest, "test", storage).take(1)[0]
    assert sorted(row) == ["coarse_label", "image", "label", "row_id"]
    assert row["image"].shape == (32, 32, 3)
    size = sum((tmp_path / shard["path"]).stat().st_size for shard in manifest["splits"]["train"]["shards"])
    assert size < 45_000 * 3072, "a pixel takes no more than a byte"
    assert seconds < 60
