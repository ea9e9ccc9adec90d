"""Reads verified shards: from storage with a limited number of tries, through a cache on the host's disk, and ahead."""

import contextlib
import logging
import mmap
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.rows import Rows
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shards import from_table, read_table
from pipeline.masking import mask
from pipeline.storage import Storage

logger = logging.getLogger(__name__)
TRIES = 5
FIRST_PAUSE_SECONDS = 0.5
"""Before the second try; each further pause is twice as long."""
Entry = Mapping[str, Any]
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class ShardUnavailableError(OSError):
    """The store did not give a shard, however often it was asked."""


@dataclass(frozen=True)
class ShardReader:
    """Reads shards whose bytes are those that a manifest names."""

    storage: Storage
    """Where the shards are."""
    cache: ShardCache | None = None
    """Keeps shards on the host's disk; None: every read is one from storage."""

    def read(self, entry: Entry) -> Rows:
        """The rows of a shard in the order of its file.

        Raises: as `table`.
        """
        return from_table(self.table(entry))

    def table(self, entry: Entry, columns: Sequence[str] | None = None) -> pa.Table:
        """The named columns of a shard, or all.

        Raises:
            CorruptFileError: if the shard is missing or has other bytes.
            ShardUnavailableError: if the store has failed `TRIES` times; names the object.
            CacheError: if the cache cannot take the shard; names `train.cache`.
        """
        data = self.cache.get(entry) if self.cache else None
        if data is None:
            data = self._fetch(entry)
            if self.cache:
                self.cache.put(entry, data)
        return read_table(data, columns)

    def _fetch(self, entry: Entry) -> bytes:
        for number in range(TRIES):
            try:
                return self.storage.read_verified(entry)
            except OSError as error:
                failure = error
            if number < TRIES - 1:
                pause = FIRST_PAUSE_SECONDS * 2**number
                # A store that fails every other read makes a training slow, of which nothing else would tell the cause.
                logger.warning(
                    "%s could not be read, try %d of %d; the next one follows in %g s: %s",
                    mask(self.storage.absolute(entry["path"])),
                    number + 1,
                    TRIES,
                    pause,
                    mask(str(failure)),
                )
                time.sleep(pause)
        path = self.storage.absolute(entry["path"])
        raise ShardUnavailableError(f"{path} could not be read in {TRIES} tries: {failure}") from failure


class ReadAhead:
    """Reads shards in one thread, a limited number of them before they are asked for.

    Args:
        reader: Reads a shard.
        entries: The shards in the order in which they are asked for; may be endless.
        ahead: How many are read, or being read, and not yet asked for.
    """

    def __init__(self, reader: ShardReader, entries: Iterator[Entry], ahead: int) -> None:
        self._room, self._is_closed = threading.Semaphore(ahead), False
        self._read: queue.SimpleQueue[Rows | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(reader, entries), name="shards", daemon=True).start()

    def _work(self, reader: ShardReader, entries: Iterator[Entry]) -> None:
        pages = _Pages()
        try:
            for entry in entries:
                self._room.acquire()
                if self._is_closed:
                    return
                self._read.put(pages.hold(reader.read(entry)))
        except BaseException as error:
            self._read.put(error)

    def next(self) -> Rows:
        """The next shard; raises what reading it has raised."""
        found = self._read.get()
        if isinstance(found, BaseException):
            raise found
        self._room.release()
        return found

    def close(self) -> None:
        """Ends the thread once it has read its present shard."""
        self._is_closed = True
        self._room.release()


class _Pages:
    """Memory for the pixels of shards, used again as soon as nobody needs the shard that was in it.

    The allocators of Arrow and of C keep more of what is freed: a reader of small shards takes a third more with them.
    Private huge pages are filled for the first time at four times the speed of the shared pages that `mmap` gives
    unless told otherwise.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def hold(self, rows: Rows) -> Rows:
        """The same rows with a copy of their pixels."""
        size = rows.images.nbytes
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < size:
            memory = _new_memory(size)
        pixels = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(pixels, self._free.append, memory).atexit = False
        pixels[:] = rows.images.reshape(-1)
        return replace(rows, images=pixels.reshape(rows.images.shape))


def _new_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # of a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
