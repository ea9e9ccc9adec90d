"""What is to be recorded of a run waits on disk until the tracking server has it.

    tracking/<identity of the run>/<number>.json           an entry that the server does not have yet
    tracking/<identity of the run>/refused/<number>.json   one that it did not take, and never will

An entry is written once and removed when the server has it, so what lies there is what is left to send, for the next
driver too. `pipeline.tracking_sender` sends it.
"""

import json
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.storage import Storage

FOLDER, REFUSED = "tracking", "refused"


@dataclass(frozen=True)
class Entry:
    """Something to be recorded of one run.

    Attributes:
        run: the run below that of the pipeline: `train`, `search/<trial>`; empty is that of the pipeline itself.
        params: never change once they are there, see `Tracker.log_params`.
        tags: of the run.
        history: metrics of epochs, each with `epoch` and `timestamp` (seconds since 1970).
        metrics: final values.
        texts: artifacts by path, their contents.
        files: artifacts by path, each a path in storage.
        dataset: keyword arguments of `Tracker.log_dataset`.
        status: that the run ends with, if it ends.
    """

    run: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] | None = None
    status: str | None = None


class Buffer:
    """The entries of one run of the pipeline that are left to send, in order.

    Args:
        storage: of the run.
        identity: of the run.
    """

    def __init__(self, storage: Storage, identity: str) -> None:
        self._storage, self._folder = storage, Storage.join(FOLDER, identity)
        self._waiting: deque[tuple[str, Entry]] = deque()
        self._unwritten: set[str] = set()
        names = [name for name in storage.list(self._folder) if name.endswith(".json")]
        numbers = [int(name.removesuffix(".json")) for name in (*names, *storage.list(f"{self._folder}/{REFUSED}"))]
        self._next = max(numbers, default=-1) + 1
        for name in names:
            try:
                values = storage.read_json(self._path(name))
                self._waiting.append((name, Entry(**values | {"history": tuple(values["history"])})))
            except (ValueError, TypeError, KeyError):  # a host that crashed may leave half of one
                self._set_aside(name, storage.read_bytes(self._path(name)))

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def path(self) -> str:
        """Where they lie."""
        return self._storage.absolute(self._folder)

    @property
    def unwritten(self) -> int:
        """How many of them are not on the disk, since it was full or away."""
        return len(self._unwritten)

    def append(self, entry: Entry) -> None:
        """Adds an entry; it is on the disk when this returns, unless the disk fails, over which no run ends."""
        name = f"{self._next:09d}.json"
        self._next += 1
        try:
            self._storage.write_json(self._path(name), asdict(entry))
        except OSError:
            self._unwritten.add(name)
        self._waiting.append((name, entry))

    def first(self) -> Entry | None:
        """The oldest entry, if there is one."""
        return self._waiting[0][1] if self._waiting else None

    def remove_first(self) -> None:
        """Forgets the oldest entry, which the server has."""
        name, _ = self._waiting.popleft()
        self._unwritten.discard(name)
        with suppress(OSError):  # it is sent once more then, which is harmless
            self._storage.delete(self._path(name))

    def refuse_first(self) -> None:
        """Sets the oldest entry aside."""
        name, entry = self._waiting.popleft()
        self._unwritten.discard(name)
        self._set_aside(name, json.dumps(asdict(entry), indent=1).encode())

    def _set_aside(self, name: str, data: bytes) -> None:
        with suppress(OSError):
            self._storage.write_bytes(Storage.join(self._folder, REFUSED, name), data)
            self._storage.delete(self._path(name))

    def _path(self, name: str) -> str:
        return Storage.join(self._folder, name)


@dataclass(frozen=True)
class Unsent:
    """What the tracking server does not have when a driver ends.

    Attributes:
        waiting: entries that the same command will send.
        unwritten: how many of these are not on the disk.
        refused: entries that the server has turned down.
        path: folder of the buffer.
        reason: the last error.
    """

    waiting: int
    unwritten: int
    refused: int
    path: str
    reason: str

    def __str__(self) -> str:
        parts = []
        if self.waiting:
            parts.append(
                f"{self.waiting} records have not reached the tracking server; they lie in {self.path}, and the same "
                "command sends them once the server answers"
            )
        if self.unwritten:
            parts.append(f"{self.unwritten} of them could not be written there and are lost")
        if self.refused:
            parts.append(f"the tracking server refused {self.refused} records; they lie in {self.path}/{REFUSED}")
        return f"{'; '.join(parts)} ({self.reason})"


def has_waiting(storage: Storage, identity: str) -> bool:
    """Whether an earlier driver has left entries of this run to send."""
    return any(name.endswith(".json") for name in storage.list(Storage.join(FOLDER, identity)))
