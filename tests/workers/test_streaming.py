"""A training on Ray whose workers stream their shards: it is named what is wrong with them, before and within."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.ray_rows import CorruptShardError
from pipeline.data.rows import Rows
from pipeline.data.shards import write_rows
from pipeline.settings.config import trained_configs
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.training.checkpoint_store import NAME
from pipeline.training.config import TrainingConfig
from pipeline.workers import train as training
from pipeline.workers.streaming import check_streams, streamed_splits
from pipeline.workflow.channel import Channel

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROWS_OF_SHARD = 500
CONFIG = replace(
    quickstart().train, shuffle_window_mb=1, num_workers=2, learning_rate_schedule="constant", max_failures=2
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def manifest(storage: Storage) -> dict[str, Any]:
    """20,000 training rows of 64 bytes, more than 1 MiB; the label of a row is its brightest pixel of the first ten."""
    random = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 40), ("validation", 2)):
        images = random.integers(0, 100, (count * ROWS_OF_SHARD, 8, 8, 1), dtype=np.uint8)
        labels = random.integers(0, 10, len(images), dtype=np.int32)
        images.reshape(len(images), 64)[np.arange(len(images)), labels] = 255
        rows = Rows.of(images, labels)
        parts = [rows.take(slice(at, at + ROWS_OF_SHARD)) for at in range(0, len(rows), ROWS_OF_SHARD)]
        shards = [write_rows(part, storage, f"{split}/{number:05d}.parquet") for number, part in enumerate(parts)]
        splits[split] = {"rows": len(rows), "shards": shards, "class_counts": np.bincount(labels).tolist()}
    return {"image_shape": [8, 8, 1], "pixel_mean": [0.2], "pixel_std": [0.2], "splits": splits}


def train(manifest: dict[str, Any], storage: Storage, config: TrainingConfig) -> dict[str, Any]:
    model, _ = trained_configs(quickstart(), manifest)
    return training.train(model, config, manifest, storage, state="state", channel=Channel())


def test_splits_that_do_not_fit_the_window_are_streamed(manifest: dict[str, Any]) -> None:
    assert streamed_splits(manifest, CONFIG) == ["train", "validation"], "memory follows from the window alone"
    assert streamed_splits(manifest, replace(CONFIG, shuffle_window_mb=2)) == []
    few = manifest | {"splits": {"train": manifest["splits"]["validation"], "validation": manifest["splits"]["train"]}}
    assert streamed_splits(few, CONFIG) == ["validation"]


def test_what_cannot_be_streamed_is_named_before_anything_starts(manifest: dict[str, Any], storage: Storage) -> None:
    splits = streamed_splits(manifest, CONFIG)
    check_streams(manifest, splits, storage, CONFIG)
    wide = manifest | {"image_shape": [64, 64, 1]}
    with pytest.raises(
        ValueError, match=r"shuffle_window_mb = 1 has no room .* give at least 4, or more data.num_shards"
    ):
        check_streams(wide, splits, storage, CONFIG)
    small = replace(CONFIG, cache="/tmp/cache", cache_gb=3.1e-5)
    with pytest.raises(ValueError, match=r"cache_gb = 3.1e-05 .* 32,000 bytes: give at least 3.2e-05, or leave out"):
        check_streams(manifest, splits, storage, small)
    storage.delete("validation/00001.parquet")
    with pytest.raises(CorruptShardError, match=r"validation/00001\.parquet is missing"):
        train(manifest, storage, CONFIG)


@pytest.mark.slow
def test_a_shard_that_is_altered_within_an_epoch_is_named_and_the_training_goes_on_once_it_is_whole(
    manifest: dict[str, Any], storage: Storage, tmp_path: Path
) -> None:
    shard = manifest["splits"]["train"]["shards"][7]
    whole = storage.read_bytes(shard["path"])

    def checkpoints() -> list[str]:
        return [name for name in storage.list("state/checkpoints") if NAME.fullmatch(name)]

    def alter() -> None:
        while not checkpoints():
            time.sleep(0.05)
        storage.write_bytes(shard["path"], whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])

    long = replace(CONFIG, epochs=100, early_stopping_patience=100, checkpoint_every_steps=20)
    altering = threading.Thread(target=alter, daemon=True)
    altering.start()
    with pytest.raises(CorruptShardError, match=r"train/00007\.parquet has SHA-256 .*--force") as caught:
        train(manifest, storage, long)
    altering.join()
    assert caught.value.expected == shard["sha256"]
    last = checkpoints()[-1]
    epoch = int(last.partition("-")[0])
    storage.write_bytes(shard["path"], whole)
    cached = replace(long, epochs=epoch + 2, cache=str(tmp_path / "cache"))
    output = train(manifest, storage, cached)
    assert [row["epoch"] for row in output["history"]] == list(range(1, epoch + 3))
    assert output["num_workers"] == 2
    assert output["history"][-1]["val_loss"] < output["history"][0]["loss"]
    assert len(list((tmp_path / "cache").iterdir())) == 42
