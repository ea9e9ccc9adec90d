"""What every reader of the comparison does. Needs NumPy alone: each reader runs in an environment of its own.

    python READER.py write PIXELS.npy FOLDER SHARDS      writes the rows in the reader's format
    python READER.py read PIXELS.npy FOLDER STEP         reads global batches

A reading process makes its first batch, that of STEP of epoch 0, and prints a line. Then it reads an epoch for every
line on its standard input, which is `check` or `time`, and prints a line of JSON after each.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

BATCH_ROWS = 256
"""Rows of a global batch."""
WINDOW_MIB = 256
"""Pixels that are mixed at a time, of those readers that have such a window."""
SEED = 0

Batches = Iterator[tuple[np.ndarray, np.ndarray]]
"""Images uint8 (256, H, W, C) and labels (256,)."""
Write = Callable[[np.ndarray, Path, int], None]
"""Writes images uint8 (N, H, W, C) into a new folder as so many shards; a row's label is its position."""
Read = Callable[[Path, tuple[int, ...], int, int], Batches]
"""Reads a folder with rows of this shape (N, H, W, C): the batches of an epoch from a step on."""


def run(write: Write, read: Read) -> None:
    """Does what the command line says."""
    what, pixels, folder, number = sys.argv[1:]
    images = np.load(pixels, mmap_mode="r")
    if what == "write":
        Path(folder).mkdir(parents=True)
        write(images, Path(folder), int(number))
        return
    next(read(Path(folder), images.shape, 0, int(number)))
    print("first", flush=True)
    for epoch, line in enumerate(sys.stdin, 1):
        start, processor = time.perf_counter(), time.process_time()
        rows = _check(images, read(Path(folder), images.shape, epoch, 0)) if line == "check\n" else 0
        if line == "time\n":
            for _, labels in read(Path(folder), images.shape, epoch, 0):
                rows += len(labels)
        seconds = time.perf_counter() - start
        print(json.dumps({"rows": rows, "seconds": seconds, "cpu": time.process_time() - processor}), flush=True)


def _check(images: np.ndarray, batches: Batches) -> int:
    """Number of the rows; fails unless each of them has its pixels and none comes twice."""
    seen = np.zeros(len(images), bool)
    for batch, labels in batches:
        labels = np.asarray(labels)
        order = np.argsort(labels)
        if seen[labels].any() or not np.array_equal(np.asarray(batch)[order], images[labels[order]]):
            raise SystemExit("a row came twice, or with other pixels")
        seen[labels] = True
    return int(seen.sum())
