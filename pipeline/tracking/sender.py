"""A thread that sends the records of an outbox to the tracking server, until the server has accepted them."""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.contact import MAY_HANG
from pipeline.storage import Storage
from pipeline.tracking.artifacts import write_probe
from pipeline.tracking.errors import is_transient, may_refuse_content
from pipeline.tracking.outbox import Outbox, Record, Unsent
from pipeline.tracking.tracker import Tracker

# Seconds between attempts to reach a server that does not answer: doubled from the first to the longest.
FIRST_WAIT, LONGEST_WAIT = 0.25, 5.0
# Fields of a record that hold pieces by name, and all, in the order in which they are logged.
_MAPPINGS = ("params", "tags", "metrics", "texts", "files")
_PARTS = ("params", "tags", "history", "metrics", "texts", "files", "dataset", "status")
_OF_EPOCHS = ("epoch", "timestamp")


class Sender:
    """Records on disk, and sends the records in order on a thread of its own.

    Records are sent at least once. `Tracker` compares them with what the server has, so that each takes effect once. A
    server that does not answer is retried for as long as the driver lives. A record that the server refuses is set
    aside, so that it does not block those after it.

    Args:
        open_tracker: Returns a new tracker. Called on the thread, until it succeeds.
        storage: Storage of the run.
        identity: Unique id of the run; the same when the run is restarted.
        name: Name of the pipeline's MLflow run, if the run has to be created.
        tracker: An open tracker to start with.
    """

    def __init__(
        self,
        open_tracker: Callable[[], Tracker],
        storage: Storage,
        identity: str,
        name: str,
        tracker: Tracker | None = None,
    ) -> None:
        self._open, self._storage, self._identity, self._name = open_tracker, storage, identity, name
        self._outbox = Outbox(storage, identity)
        self._tracker = tracker
        self._run_ids: dict[str, str] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._refused, self._reason = 0, ""
        # A daemon thread, because a call to a server that hangs returns only after its timeout.
        self._thread = threading.Thread(target=self._work, name=f"{MAY_HANG}tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow id of the pipeline's run; None until the server has been reached."""
        return self._run_ids.get("")

    def record(self, record: Record) -> None:
        """Writes the record to the outbox and returns; the thread sends it later."""
        with self._changed:
            self._outbox.record(record)
            self._changed.notify()

    def close(self, timeout: float) -> Unsent | None:
        """Waits at most `timeout` seconds until all records are sent; returns what the server lacks, or None."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            box = self._outbox
            unsent = Unsent(len(box), box.unwritten, self._refused, box.path, self._reason, box.unreadable)
        return unsent if unsent.waiting or unsent.refused or unsent.unreadable else None

    def _work(self) -> None:
        wait, refused = FIRST_WAIT, False
        while (record := self._first()) is not None:
            try:
                refusal = self._send(record)
            except Exception as error:
                self._reason = f"{type(error).__name__}: {error}"
                if self._tracker is None or is_transient(error):
                    time.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT)
                    continue
                refusal = error
            if refusal is None:
                with self._changed:
                    self._outbox.remove_first()
            elif not refused:  # the run may have been deleted on the server: look it up, or create it, once more
                self._tracker, refused = None, True
                self._run_ids.clear()
                continue
            else:
                self._reason = f"{type(refusal).__name__}: {refusal}"
                with self._changed:
                    self._refused += 1
                    self._outbox.refuse_first()
            wait, refused = FIRST_WAIT, False

    def _first(self) -> Record | None:
        """Waits for the next record to send; None when the sender is closing and all records are sent."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._outbox) or self._closing)
            return self._outbox.first()

    def _send(self, record: Record) -> Exception | None:
        """Logs a record; returns the error by which the store refused a part of it, or None.

        Raises:
            Exception: any error that comes before.
        """
        if self._tracker is None:
            self._tracker = self._open()
        refusal = _log(record, self._tracker, self._run_id(record.run), self._storage)
        if record.status and record.run:
            del self._run_ids[record.run]
        return refusal

    def _run_id(self, run: str) -> str:
        """MLflow id of a run, which is created if it does not exist, as are its parents."""
        assert self._tracker is not None
        if run not in self._run_ids:
            parent, _, name = run.rpartition("/")
            self._run_ids[run] = self._tracker.find_or_create_run(
                name or self._name,
                f"{self._identity}/{run}" if run else self._identity,
                self._run_id(parent) if run else None,
            )
        return self._run_ids[run]


def _log(record: Record, tracker: Tracker, run_id: str, storage: Storage) -> Exception | None:
    """Logs all parts of a record to the MLflow run `run_id`. Safe to repeat.

    A part that is refused is logged in pieces, so that a name or a text that is not taken costs no other one.

    Returns:
        The first error by which the store refused a piece, once the others are logged; None if it took all.

    Raises:
        Exception: any other error, at once.
    """
    refusal: Exception | None = None
    waiting = deque((name, value) for name in _PARTS if (value := getattr(record, name)))
    while waiting:
        name, value = waiting.popleft()
        try:
            _log_part(name, value, tracker, run_id, storage)
        except Exception as error:
            if is_transient(error) and not (may_refuse_content(error) and _takes_others(name, tracker)):
                raise
            pieces = _pieces(name, value)
            waiting.extendleft((name, piece) for piece in reversed(pieces))
            if not pieces:
                refusal = refusal or error
    return refusal


def _log_part(name: str, value: Any, tracker: Tracker, run_id: str, storage: Storage) -> None:
    """Logs `value` as the field `name` of a record."""
    match name:
        case "params":
            tracker.log_params(run_id, value)
        case "tags":
            tracker.set_tags(run_id, value)
        case "history":
            tracker.log_history(run_id, value)
        case "metrics":
            tracker.log_metrics(run_id, value)
        case "texts":
            for path, text in value.items():
                tracker.log_text(run_id, text, path)
        case "files":
            for path, stored in value.items():
                _log_file(tracker, run_id, storage, stored, path)
        case "dataset":
            tracker.log_dataset(run_id, **value)
        case "status":
            tracker.finish(run_id, value)


def _pieces(name: str, value: Any) -> list[Any]:
    """What the field `name` of a record consists of, each in the form of the field; empty if that is one piece."""
    pieces: list[Any] = []
    if name == "history":
        for key in dict.fromkeys(key for row in value for key in row if key not in _OF_EPOCHS):
            rows = (row for row in value if key in row)
            pieces.append(tuple({k: row[k] for k in (*_OF_EPOCHS, key) if k in row} for row in rows))
    elif name in _MAPPINGS:
        pieces = [{key: value[key]} for key in value]
    return pieces if len(pieces) > 1 else []


def _takes_others(name: str, tracker: Tracker) -> bool:
    """Whether the server or the store takes, by the same login, something else than the field `name` of a record."""
    try:
        if name in ("texts", "files"):
            write_probe(tracker)
        else:
            tracker.check_writing()
    except Exception:
        return False
    return True


def _log_file(tracker: Tracker, run_id: str, storage: Storage, stored: str, path: str) -> None:
    folder, _, name = path.rpartition("/")
    with TemporaryDirectory() as local:
        storage.download(stored, Path(local) / name)
        tracker.log_file(run_id, Path(local) / name, folder or None)
