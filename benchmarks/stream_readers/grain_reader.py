"""Grain with ArrayRecord files: a global shuffle by random access; a step is reached by its number."""

from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from contest import BATCH_ROWS, SEED, Batches, run

LABEL_BYTES = 8
THREADS = 2


def write(images: np.ndarray, folder: Path, shards: int) -> None:
    for number, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        # A record a group, as its documentation advises for random access.
        writer = ArrayRecordWriter(str(folder / f"{number:05d}.arecord"), "group_size:1,uncompressed")
        for row in rows.tolist():
            writer.write(row.to_bytes(LABEL_BYTES, "little") + images[row].tobytes())
        writer.close()


def read(folder: Path, shape: tuple[int, ...], epoch: int, step: int) -> Batches:
    def parse(record: bytes) -> tuple[np.ndarray, int]:
        pixels = np.frombuffer(record, np.uint8, offset=LABEL_BYTES).reshape(shape[1:])
        return pixels, int.from_bytes(record[:LABEL_BYTES], "little")

    source = grain.sources.ArrayRecordDataSource(sorted(map(str, folder.glob("*.arecord"))))
    rows = grain.MapDataset.source(source).shuffle(SEED + epoch).map(parse)
    batches = rows.batch(BATCH_ROWS, drop_remainder=True)[step:]
    yield from batches.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=8))


if __name__ == "__main__":
    run(write, read)
