"""Streamed reading of real shards: exact pixels, few reads after a resume, named errors, bounded memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamed_shards import NotingReader, streamed, write_shards

from pipeline.data import shard_reader
from pipeline.data.rows import Rows
from pipeline.data.shard_reader import ShardReader, ShardUnavailableError
from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import CorruptFileError, Storage
from pipeline.training.batches import evaluation_slices, train_batches
from pipeline.training.config import TrainingConfig

SHAPE = (6, 5, 3)
COUNTS = [20, 21, 20, 19, 20, 23, 20, 20, 17, 20, 20, 20, 20, 20, 20, 20]
SIZE, STEPS = 32, sum(COUNTS) // 32
SETTINGS = TrainingConfig(
    num_workers=1, global_batch_size=SIZE, random_crop_padding=1, random_flip=True, seed=5, cutmix=0.5
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Rows, list[dict[str, Any]]]:
    storage = Storage(str(tmp_path_factory.mktemp("shards")))
    return storage, *write_shards(storage, COUNTS, SHAPE)


@pytest.fixture
def data(made: tuple[Storage, Rows, list[dict[str, Any]]]) -> StreamedRows:
    """With 4 lanes of 2 shards."""
    return streamed(ShardReader(made[0]), made[2], SHAPE, depth=8)


def taken(data: StreamedRows, own: slice, epoch: int = 0, step: int = 0) -> Iterator[Rows]:
    for _, _, batch in data.global_batches(SIZE, 5, own, epoch=epoch, step=step):
        yield batch.take(own)


def test_pixels_and_ids_belong_together_and_each_row_occurs_once(data: StreamedRows, made: Any) -> None:
    rows = made[1]
    assert (len(data), data.image_shape) == (sum(COUNTS), SHAPE)
    assert (data.order(SIZE, 5).lanes, data.order(SIZE, 5).depth) == (4, 2)
    batches = list(islice(taken(data, slice(0, SIZE)), 2 * STEPS))
    for batch in batches:
        np.testing.assert_array_equal(batch.images, rows.images[batch.row_ids])
        np.testing.assert_array_equal(batch.labels, batch.row_ids)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
    for epoch in (batches[:STEPS], batches[STEPS:]):
        seen = np.concatenate([batch.row_ids for batch in epoch])
        assert len(np.unique(seen)) == len(seen) == STEPS * SIZE


@pytest.mark.parametrize("num_workers", [2, 4, 8])
@pytest.mark.parametrize("settings", [replace(SETTINGS, cutmix=0.0), SETTINGS], ids=["augmented", "mixed"])
def test_all_ranks_together_see_what_one_worker_sees(
    data: StreamedRows, settings: TrainingConfig, num_workers: int
) -> None:
    single = islice(train_batches(data, settings, sum(COUNTS), rank=0, num_workers=1), STEPS + 2)
    ranks = [
        train_batches(data, settings, sum(COUNTS), rank=rank, num_workers=num_workers) for rank in range(num_workers)
    ]
    for images, labels in single:
        parts = [next(rank) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), images)
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), labels)


def test_three_workers_share_lanes(made: Any) -> None:
    data = streamed(ShardReader(made[0]), made[2], SHAPE, depth=12)
    sizes = {"size": 24, "seed": 5, "epoch": 0, "step": 3}
    assert data.order(24, 5).lanes == 2
    whole, *parts = (
        data.global_batches(own=own, **sizes) for own in (slice(0, 24), slice(0, 8), slice(8, 16), slice(16, 24))
    )
    for _ in range(20):
        expected = next(whole)[2].take(slice(0, 24))
        found = [next(part)[2].take(slice(8 * rank, 8 * rank + 8)) for rank, part in enumerate(parts)]
        np.testing.assert_array_equal(np.concatenate([part.row_ids for part in found]), expected.row_ids)
        np.testing.assert_array_equal(np.concatenate([part.images for part in found]), expected.images)


def test_a_resumed_run_sees_what_an_unbroken_one_does_and_reads_no_shard_before(made: Any, data: StreamedRows) -> None:
    unbroken = list(islice(train_batches(data, SETTINGS, sum(COUNTS), rank=1, num_workers=2), 2 * STEPS))
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 2 * STEPS - 1, 12).tolist():
        reader = NotingReader(made[0])
        resumed = train_batches(
            streamed(reader, made[2], SHAPE, depth=8), SETTINGS, sum(COUNTS), rank=1, num_workers=2, step=at
        )
        images, labels = next(resumed)
        # 2 of the 4 lanes: 2 shards in the window of each, one ahead, and one if the batch goes over the end of a slot.
        assert len(reader.read_paths) <= 2 * (2 + 1 + 1)
        for expected, found in zip(unbroken[at:], [(images, labels), *islice(resumed, 3)], strict=False):
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_an_epoch_reads_each_shard_once_and_again_where_lanes_are_cut(made: Any) -> None:
    reader = NotingReader(made[0])
    batches = taken(streamed(reader, made[2], SHAPE, depth=8), slice(0, SIZE))
    list(islice(batches, STEPS))
    assert len(COUNTS) <= len(reader.read_paths) <= len(COUNTS) + 4 - 1 + 4  # 4 are read ahead for the next epoch
    assert set(reader.read_paths) == {shard["path"] for shard in made[2]}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 32, 1000])
def test_evaluation_visits_every_row_once_in_the_order_of_the_shards(
    data: StreamedRows, made: Any, size: int, num_workers: int
) -> None:
    slices = [evaluation_slices(len(data), size, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    ranks = [data.in_order(bounds) for bounds in slices]
    for _ in range(2):  # again and again
        parts = [next(rank) for _ in slices[0] for rank in ranks]
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), np.arange(len(data)))
        np.testing.assert_array_equal(np.concatenate([images for images, _ in parts]), made[1].images)


def test_a_changed_or_missing_shard_is_named(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    _, shards = write_shards(storage, COUNTS, SHAPE)
    data = streamed(ShardReader(storage), shards, SHAPE, depth=8)
    batches = taken(data, slice(0, SIZE))
    next(batches)
    for shard in shards:
        raw = bytearray(storage.read_bytes(shard["path"]))
        raw[len(raw) // 2] ^= 1
        storage.write_bytes(shard["path"], bytes(raw))
    with pytest.raises(CorruptFileError, match=r"train/000..\.parquet has SHA-256 .*--force") as caught:
        list(batches)
    assert data.failure is caught.value
    storage.delete("train")
    with pytest.raises(CorruptFileError, match=r"train/00000\.parquet is missing"):
        next(data.in_order(evaluation_slices(len(data), 8)))


def test_a_store_that_fails_is_asked_again_and_then_named(
    made: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage, rows, shards = made
    monkeypatch.setattr(shard_reader, "FIRST_PAUSE_SECONDS", 0.001)
    real, failures = Storage.read_bytes, [0]

    def read_bytes(self: Storage, path: str) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError("the store is busy")
        return real(self, path)

    monkeypatch.setattr(Storage, "read_bytes", read_bytes)
    failures[0] = 4
    np.testing.assert_array_equal(ShardReader(storage).read(shards[0]).images, rows.images[:20])
    assert [record.getMessage().partition("could not be read, ")[2] for record in caplog.records] == [
        f"try {number} of 5; the next one follows in {pause:g} s: the store is busy"
        for number, pause in enumerate([0.001, 0.002, 0.004, 0.008], 1)
    ]
    failures[0] = 5
    with pytest.raises(ShardUnavailableError, match=r"train/00001\.parquet could not be read in 5 tries: the store is"):
        ShardReader(storage).read(shards[1])


def test_a_readers_memory_follows_the_formula(tmp_path: Path) -> None:
    """200 MB of pixels in shards of 1 MiB, a window of 32 MiB: 16 lanes of 2 shards and one ahead."""
    storage, shape = Storage(str(tmp_path)), (64, 64, 3)
    _, shards = write_shards(storage, [85] * 200, shape)
    code = f"""if True:
        import json, sys, time
        from pipeline.data.shard_reader import ShardReader
        from pipeline.data.streamed_rows import StreamedRows
        from pipeline.storage import Storage
        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
        data = StreamedRows(ShardReader(Storage(sys.argv[1])), json.loads(sys.argv[2]), {shape}, {32 * 2**20})
        order = data.order(128, 0)
        ShardReader(Storage(sys.argv[1])).read(json.loads(sys.argv[2])[0])
        base = peak()
        peaks = []
        for epoch, step, batch in data.global_batches(128, 0, slice(0, 128), epoch=0, step=0):
            batch.take(slice(0, 128))
            if step == 20:
                time.sleep(0.5)  # time for all shards that are read ahead
            if step == order.steps - 1:
                peaks.append(peak())
            if epoch == 2:
                break
        print(json.dumps([order.lanes, order.depth, base, peaks]))
    """
    command = [sys.executable, "-c", code, storage.root, json.dumps(shards)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    lanes, depth, base, peaks = json.loads(done.stdout)
    assert (lanes, depth) == (16, 2)
    shard = 85 * 64 * 64 * 3
    formula = lanes * (depth + 1) * shard + 2 * shard + 4 * 128 * 64 * 64 * 3
    assert 0.5 * formula < peaks[-1] - base < 1.1 * formula, (peaks, base, formula)
    assert peaks[-1] < 1.05 * peaks[0], "flat over the epochs"
