"""Lets one driver at a time work at a run, or at a task that several runs share.

A driver writes a claim to storage and renews it. A second driver waits, and takes over when the first one is dead.

    drivers/<key>/<id>.json     the claim of one driver on the run or task with this key

No library does this: network folders and object stores have no lock that ends with its process. Claims are compared
instead: of those that are alive, the one with the smallest id wins after it has been unopposed for `SETTLE_SECONDS`. A
claim is alive while its content changes, so that no clocks are compared between machines. A driver that stalls, or
whose storage does, for longer than `PATIENCE_SECONDS` is followed by another one while it may still work: what they
commit is whole, and a driver that finds its claim gone gives up.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pipeline.storage import Storage

BEAT_SECONDS = 5.0
# After this time without a change, the driver of a claim counts as dead.
PATIENCE_SECONDS = 30.0
SETTLE_SECONDS = 0.8
POLL_SECONDS = 0.4


class LeaseLost(RuntimeError):
    """Another driver has taken over, since this one did not renew its claim in time."""


@dataclass(frozen=True)
class Claim:
    """The content of a claim file.

    Attributes:
        host: Host name of the driver.
        machine: Id of the running system and its space of process ids; the same for all processes in it.
        pid: Process id of the driver.
        born: Start time of the process in the machine's own unit, since process ids are used again.
        beat: Counter that grows while the driver lives.
        holds: Whether the driver holds what it claims.
    """

    host: str
    machine: str
    pid: int
    born: str
    beat: int = 0
    holds: bool = False

    @classmethod
    def of_this_process(cls) -> "Claim":
        return cls(socket.gethostname(), _machine(), os.getpid(), _born(os.getpid()) or "")

    @classmethod
    def from_json(cls, value: object) -> "Claim":
        """The claim that a file has.

        Raises:
            ValueError: if it is none.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        if not isinstance(value, dict) or {name: type(part) for name, part in value.items()} != kinds:
            raise ValueError("it is no claim of a driver")
        return cls(**value)

    def is_dead(self) -> bool:
        """Whether the process is known to be gone. Nothing is known about processes of other machines."""
        return self.machine == _machine() and self.born != _born(self.pid)


class Lease:
    """The right to work at a run and its tasks; held while entered.

    All keys are acquired at once, so that two drivers that share some of them never wait for each other.

    Args:
        storage: Where the claims are.
        keys: Keys of the run and of its tasks.
        waiting: Called repeatedly while another driver holds one of the keys, with the first such key and its claim.
    """

    def __init__(self, storage: Storage, keys: Iterable[str], waiting: Callable[[str, Claim], None]) -> None:
        self._storage, self._keys, self._waiting = storage, dict.fromkeys(keys), waiting
        self._id = uuid.uuid4().hex[:12]
        self._claim = Claim.of_this_process()
        # Claims of others by path, and when each was last seen to change.
        self._changed: dict[str, tuple[Claim, float]] = {}
        self._renewed = _clock()  # when the own claim was last written
        self._lock = threading.Lock()  # of the own claim
        self._leave = threading.Event()

    def __enter__(self) -> "Lease":
        self._write()
        beats = threading.Thread(target=self._beat, daemon=True, name="lease")
        beats.start()
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        for key in list(self._keys):
            self.release(key)

    def release(self, key: str) -> None:
        """Gives up one key; does nothing if it is not held.

        A claim that cannot be deleted is not renewed either, so that others take it for dead a little later: no reason
        to end a run, or to say that instead of what has ended it.
        """
        with self._lock:
            self._keys.pop(key, None)
            with contextlib.suppress(OSError):
                self._storage.delete(self._path(key))

    def check(self) -> None:
        """Call this before writing anything that only the holder may write.

        Raises:
            LeaseLost: if another driver has taken over.
        """
        with self._lock:  # not while a claim that others have removed may be back for a moment
            is_lost = not self._is_there() or (self._is_late() and self._is_held_by_another())
        if is_lost:
            raise LeaseLost("another driver works at this run, since this one gave no sign of life: it goes on there")

    def _take(self) -> None:
        """Waits until this driver may hold all keys, marks its claims as holding, and removes those of dead drivers."""
        unopposed_since: float | None = None
        while True:
            others = self._others()
            holders = [(path.split("/")[1], claim) for path, claim in others.items() if claim.holds]
            if holders:
                unopposed_since = None
                self._waiting(*holders[0])
            elif any(path.rpartition("/")[2] < self._id for path in others):
                unopposed_since = None
            elif unopposed_since is None:
                unopposed_since = time.monotonic()
            elif time.monotonic() - unopposed_since >= SETTLE_SECONDS:
                dead = self._changed.keys() - others.keys()
                self._write(holds=True)
                # Between the look and the write this process may have stalled, and another one may have come to hold.
                if not self._is_held_by_another():
                    break
                self._write(holds=False)
                unopposed_since = None
            time.sleep(POLL_SECONDS)
            self._write()  # a client of NFS lists a folder anew once it has written there
        for path in dead:
            self._storage.delete(path)

    def _others(self) -> dict[str, Claim]:
        """The claims of other living drivers, by path."""
        alive = {}
        files = [f"{_folder(key)}/{name}" for key in list(self._keys) for name in self._storage.list(_folder(key))]
        for path in files:
            if path == self._path(path.split("/")[1]) or not path.endswith(".json"):
                continue
            try:
                claim = Claim.from_json(self._storage.read_json(path))
            except FileNotFoundError:
                continue  # it has just ended
            except ValueError as error:
                raise ValueError(f"{self._storage.absolute(path)}: {error}: delete the file") from error
            before, since = self._changed.get(path, (None, 0.0))
            if claim != before:
                since = time.monotonic()
            self._changed[path] = claim, since
            if not claim.is_dead() and time.monotonic() - since < PATIENCE_SECONDS:
                alive[path] = claim
        return alive

    def _beat(self) -> None:
        while not self._leave.wait(BEAT_SECONDS):
            try:
                self._write()
            except (OSError, ValueError):
                continue  # a storage that stalls is asked again, and a damaged claim is another driver's

    def _write(self, holds: bool | None = None) -> None:
        """Renews the own claim; `holds` says whether it holds from now on, and None leaves that as it is."""
        with self._lock:
            if self._leave.is_set():
                return
            if holds is None and self._claim.holds and not self._is_there():
                return  # lost: a claim that others have removed is not put back
            holds = self._claim.holds if holds is None else holds
            self._claim = replace(self._claim, beat=self._claim.beat + 1, holds=holds)
            for key in self._keys:
                self._storage.write_json(self._path(key), asdict(self._claim))
            # A process that has stalled, be it before the look above, may have put back what others had removed.
            if holds and self._is_late() and self._is_held_by_another():
                for key in self._keys:
                    self._storage.delete(self._path(key))
            self._renewed = _clock()

    def _is_late(self) -> bool:
        """Whether the own claim has not been renewed for so long that others may have taken this driver for dead."""
        return _clock() - self._renewed > 2 * BEAT_SECONDS

    def _is_held_by_another(self) -> bool:
        return any(claim.holds for claim in self._others().values())

    def _is_there(self) -> bool:
        return all(self._storage.exists(self._path(key)) for key in list(self._keys))

    def _path(self, key: str) -> str:
        return f"{_folder(key)}/{self._id}.json"


def _clock() -> float:
    """Seconds by a clock that also counts while the machine sleeps, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _folder(key: str) -> str:
    return f"drivers/{key}"


def _machine() -> str:
    """Id of the running system and of the space of process ids in it."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return json.dumps([socket.gethostname(), uuid.getnode()])
    return f"{boot.read_text().strip()} {os.readlink(processes)}"


def _born(pid: int) -> str | None:
    """Start time of a process; None if there is no such process."""
    try:
        if not Path("/proc/self/stat").exists():
            return "unknown"  # a system without /proc: its claims end when others lose patience
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]
