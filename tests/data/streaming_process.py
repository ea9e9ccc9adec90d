"""A worker that only reads: `python streaming_process.py STORAGE SHARDS WINDOW G START STOP EPOCH STEP`.

It prints a line a batch: epoch, step, SHA-256 of its row ids and pixels, the number of shards read so far, and the ids.
"""

import hashlib
import json
import sys

from streamed_shards import NotingReader

from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import Storage

SHAPE = (6, 5, 3)


def main() -> None:
    root, shards, *numbers = sys.argv[1:]
    window, size, start, stop, epoch, step = map(int, numbers)
    reader = NotingReader(Storage(root))
    data = StreamedRows(reader, json.loads(shards), SHAPE, window)
    for at_epoch, at_step, batch in data.global_batches(size, 5, slice(start, stop), epoch=epoch, step=step):
        rows = batch.take(slice(start, stop))
        digest = hashlib.sha256(rows.row_ids.tobytes() + rows.images.tobytes()).hexdigest()
        print(at_epoch, at_step, digest, len(reader.read_paths), *rows.row_ids, flush=True)


if __name__ == "__main__":
    main()
