"""This project's reader: `StreamedRows`, which verifies the SHA-256 of every shard."""

import json
from pathlib import Path

import numpy as np
from contest import BATCH_ROWS, SEED, WINDOW_MIB, Batches, run

from pipeline.data.order import MIB
from pipeline.data.rows import Rows
from pipeline.data.shard_reader import ShardReader
from pipeline.data.shards import write_rows
from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import Storage


def write(images: np.ndarray, folder: Path, shards: int) -> None:
    storage = Storage(str(folder))
    order = np.random.default_rng(SEED).permutation(len(images))
    entries = []
    for number, part in enumerate(np.array_split(order, shards)):
        rows = Rows(part, images[np.sort(part)][np.argsort(np.argsort(part))], part.astype(np.int32))
        entries.append(write_rows(rows, storage, f"{number:05d}.parquet"))
    storage.write_json("shards.json", entries)


def read(folder: Path, shape: tuple[int, ...], epoch: int, step: int) -> Batches:
    shards = json.loads((folder / "shards.json").read_text())
    _, height, width, channels = shape
    # The smallest window that the reader takes has two shards.
    window = max(WINDOW_MIB * MIB, 2 * max(shard["rows"] for shard in shards) * height * width * channels)
    rows = StreamedRows(ShardReader(Storage(str(folder))), shards, (height, width, channels), window)
    own = slice(0, BATCH_ROWS)
    batches = rows.global_batches(BATCH_ROWS, SEED, own, epoch=epoch, step=step)
    for at_epoch, at_step, batch in batches:
        taken = batch.take(own)
        yield taken.images, taken.labels
        if at_epoch == epoch and at_step + 1 == len(rows) // BATCH_ROWS:
            batches.close()  # type: ignore[attr-defined]  # it is a generator
            return


if __name__ == "__main__":
    run(write, read)
