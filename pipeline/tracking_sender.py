"""Sends what waits in a buffer to the tracking server, on a thread of its own, until the server has taken it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.storage import Storage
from pipeline.tracking import Tracker, is_transient
from pipeline.tracking_buffer import Buffer, Entry, Unsent

# Waits between attempts to reach a server that does not answer: doubled from the first to the last.
FIRST_WAIT, LONGEST_WAIT = 0.25, 5.0


class Sender:
    """Sends the entries of a buffer in order, on a thread of its own, until the server has taken them.

    Sending is at least once; `Tracker` makes it once, since it compares with what the server has. A server that does
    not answer is asked again, for as long as the driver lives. An entry that the server refuses is set aside, so that
    it does not hold up the others.

    Args:
        open_tracker: makes a tracker; called on the thread, until it succeeds.
        storage: of the run.
        identity: of the run.
        name: of the pipeline's run, if it has to be made.
        tracker: the one to begin with, if there is one.
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
        self._buffer = Buffer(storage, identity)
        self._tracker = tracker
        self._runs: dict[str, str] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._refused, self._reason = 0, ""
        # A daemon, since a server that hangs holds a call until its time is up.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """Of the pipeline's run; None if the server has not said yet."""
        return self._runs.get("")

    def submit(self, entry: Entry) -> None:
        """Writes the entry to the buffer and returns; it is sent later."""
        with self._changed:
            self._buffer.append(entry)
            self._changed.notify()

    def close(self, timeout: float) -> Unsent | None:
        """Waits at most `timeout` seconds until all is sent; returns what is not, None if nothing is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            unsent = Unsent(len(self._buffer), self._buffer.unwritten, self._refused, self._buffer.path, self._reason)
        return unsent if unsent.waiting or unsent.refused else None

    def _work(self) -> None:
        wait, refused = FIRST_WAIT, False
        while (entry := self._first()) is not None:
            try:
                self._send(entry)
            except Exception as error:
                self._reason = f"{type(error).__name__}: {error}"
                if self._tracker is None or is_transient(error):
                    time.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT)
                    continue
                if not refused:  # what was known of the server may not be so any more: its runs are looked up again
                    self._tracker, refused = None, True
                    self._runs.clear()
                    continue
                with self._changed:
                    self._refused += 1
                    self._buffer.refuse_first()
            else:
                with self._changed:
                    self._buffer.remove_first()
            wait, refused = FIRST_WAIT, False

    def _first(self) -> Entry | None:
        """The next entry to send, waited for; None when the sender is closing and all is sent."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._buffer) or self._closing)
            return self._buffer.first()

    def _send(self, entry: Entry) -> None:
        if self._tracker is None:
            self._tracker = self._open()
        _record(entry, self._tracker, self._run_id(entry.run), self._storage)
        if entry.status and entry.run:
            del self._runs[entry.run]

    def _run_id(self, run: str) -> str:
        """Of the run of a task, or of a trial below its task; made if it is absent."""
        assert self._tracker is not None
        if run not in self._runs:
            parent, _, name = run.rpartition("/")
            self._runs[run] = self._tracker.find_or_create_run(
                name or self._name,
                f"{self._identity}/{run}" if run else self._identity,
                self._run_id(parent) if run else None,
            )
        return self._runs[run]


def _record(entry: Entry, tracker: Tracker, run_id: str, storage: Storage) -> None:
    """Records an entry in the run `run_id`; may be repeated."""
    if entry.params:
        tracker.log_params(run_id, entry.params)
    if entry.tags:
        tracker.set_tags(run_id, entry.tags)
    if entry.history:
        tracker.log_history(run_id, entry.history)
    if entry.metrics:
        tracker.log_metrics(run_id, entry.metrics)
    for path, text in entry.texts.items():
        tracker.log_text(run_id, text, path)
    for path, stored in entry.files.items():
        folder, _, name = path.rpartition("/")
        with TemporaryDirectory() as local:
            storage.download(stored, Path(local) / name)
            tracker.log_file(run_id, Path(local) / name, folder or None)
    if entry.dataset:
        tracker.log_dataset(run_id, **entry.dataset)
    if entry.status:
        tracker.finish(run_id, entry.status)
