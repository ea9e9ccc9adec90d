"""An outbox on disk: records of a run wait there until the tracking server has them.

    tracking/<run identity>/<number>.json           a record that the server does not have yet
    tracking/<run identity>/refused/<number>.json   a record that the server refused for good, or that cannot be read

A record is written once and deleted when the server has it. What lies in the folder is therefore what is left to send,
also for a later driver of the same run. MLflow's asynchronous logging does not replace it: its queue is in memory, so
it is lost when the driver is killed, and a batch whose request fails is dropped.
"""

import json
import re
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.masking import mask
from pipeline.storage import Storage

FOLDER, REFUSED = "tracking", "refused"
# Other files may lie beside the records: a process that is killed while it writes one leaves a temporary file.
_NAME = re.compile(r"\d+\.json")


@dataclass(frozen=True)
class Record:
    """Data to be added to one MLflow run. Stored as JSON: a new field needs a default value.

    Attributes:
        run: Path of the run below the pipeline's run: `train`, `search/<trial>`; empty for the pipeline's run itself.
        params: Parameters, which never change once logged; see `Tracker.log_params`.
        tags: Tags of the run.
        history: Metrics of epochs; each mapping has `epoch` and `timestamp` (seconds since 1970).
        metrics: Final values.
        texts: Contents of text artifacts, by artifact path.
        files: Storage paths of file artifacts, by artifact path.
        dataset: Keyword arguments of `Tracker.log_dataset`.
        status: Final status of the run; None while it goes on.
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


class Outbox:
    """The unsent records of one run of the pipeline, oldest first. Not thread-safe.

    Args:
        storage: Storage of the run.
        identity: Unique id of the run; the same when the run is restarted.
    """

    def __init__(self, storage: Storage, identity: str) -> None:
        self._storage, self._folder = storage, Storage.join(FOLDER, identity)
        self._waiting: deque[tuple[str, Record]] = deque()
        self._unwritten: set[str] = set()
        self._unreadable = 0
        names = _records(storage, self._folder)
        known = (*names, *_records(storage, Storage.join(self._folder, REFUSED)))
        numbers = [int(name.removesuffix(".json")) for name in known]
        self._next = max(numbers, default=-1) + 1
        for name in names:
            try:
                values = storage.read_json(self._path(name))
                self._waiting.append((name, Record(**values | {"history": tuple(values["history"])})))
            except (ValueError, TypeError, KeyError):  # a host that crashed may leave a truncated file
                self._unreadable += 1
                self._set_aside(name, storage.read_bytes(self._path(name)))

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def path(self) -> str:
        """Absolute path or URI of the folder."""
        return self._storage.absolute(self._folder)

    @property
    def unwritten(self) -> int:
        """Number of waiting records that are in memory only, because writing them failed."""
        return len(self._unwritten)

    @property
    def unreadable(self) -> int:
        """Number of records of an earlier driver that could not be read, and were set aside."""
        return self._unreadable

    def record(self, record: Record) -> None:
        """Adds a record. It is on disk on return; if writing fails, it is kept in memory and the run goes on."""
        name = f"{self._next:09d}.json"
        self._next += 1
        try:
            self._storage.write_json(self._path(name), asdict(record))
        except OSError:
            self._unwritten.add(name)
        self._waiting.append((name, record))

    def first(self) -> Record | None:
        """The oldest record; None if the outbox is empty."""
        return self._waiting[0][1] if self._waiting else None

    def remove_first(self) -> None:
        """Deletes the oldest record, once the server has it."""
        name, _ = self._waiting.popleft()
        self._unwritten.discard(name)
        with suppress(OSError):  # it will be sent again, which is harmless
            self._storage.delete(self._path(name))

    def refuse_first(self) -> None:
        """Moves the oldest record to the refused ones."""
        name, record = self._waiting.popleft()
        self._unwritten.discard(name)
        self._set_aside(name, json.dumps(asdict(record), indent=1).encode())

    def _set_aside(self, name: str, data: bytes) -> None:
        with suppress(OSError):
            self._storage.write_bytes(Storage.join(self._folder, REFUSED, name), data)
            self._storage.delete(self._path(name))

    def _path(self, name: str) -> str:
        return Storage.join(self._folder, name)


@dataclass(frozen=True)
class Unsent:
    """What the tracking server lacks when a driver ends; `str` gives the message for the user.

    Attributes:
        waiting: Number of records that are left to send; a restart of the run sends them.
        unwritten: How many of these are not on disk, and are lost.
        refused: Number of records that the server refused.
        path: Folder of the outbox.
        reason: The last error; empty if there was none.
        unreadable: Number of records of an earlier driver that could not be read.
    """

    waiting: int
    unwritten: int
    refused: int
    path: str
    reason: str
    unreadable: int = 0

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
        if self.unreadable:
            parts.append(
                f"{self.unreadable} records that an earlier driver had left could not be read, as after a crash of its "
                f"host; what is left of them lies in {self.path}/{REFUSED}"
            )
        return mask("; ".join(parts) + (f" ({self.reason})" if self.reason else ""))


def has_waiting(storage: Storage, identity: str) -> bool:
    """Whether an earlier driver of this run left records to send."""
    return bool(_records(storage, Storage.join(FOLDER, identity)))


def _records(storage: Storage, folder: str) -> list[str]:
    """Names of the files of records in a folder, oldest first."""
    return [name for name in storage.list(folder) if _NAME.fullmatch(name)]
