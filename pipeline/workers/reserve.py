"""Processes in reserve, one for each worker of a host, that have imported TensorFlow before they are needed.

When a worker dies, Ray Train ends the others and starts all of them anew. Most of that time is the import of
TensorFlow. A reserve is a process of the cluster that nobody uses yet: Ray takes it for the next actor that wants the
environment of the workers, and starts a process only if there is none. It holds no CPU and no GPU. It ends by itself
when the workers of its host are gone and nobody has taken it, and when the memory of the host gets scarce.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.workers import ray_internals

RESERVE_BYTES = 400 << 20
"""What a process in reserve takes of the memory of its host: 333 MiB, besides the libraries that it shares."""
SPARE_SHARE = 0.15
"""Share of the memory of a host, or of a container, that stays free beside the reserve."""
DELAY_SECONDS = 5.0
"""From the first checkpoint or epoch of a group until its reserve is started, so that neither slows the other down."""
GRACE_SECONDS = 30.0
"""How long a process in reserve waits for new workers when those of its host are gone."""
POLL_SECONDS = 5.0
_BACKLOG = 128
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)

logger = logging.getLogger(__name__)
_present: list[socket.socket] = []


def with_reserve(environment: dict[str, Any]) -> dict[str, Any]:
    """A runtime environment of workers that have a reserve: it imports TensorFlow when a process starts.

    It is `environment` itself if the job of this process has a hook of its own for that moment.
    """

    # Within a function, so that it is pickled by value: an error in its import would end the process.
    def import_ahead() -> None:
        try:
            from pipeline.workers import reserve
        except Exception:
            return  # the worker says it itself
        reserve.import_ahead()

    return ray_internals.on_process_start(import_ahead, environment)


def keep_one(local_rank: int, local_size: int) -> Callable[[], None]:
    """Returns a function that starts one process in reserve on this host, some seconds after its first call.

    Each worker of a group has one. What goes wrong costs the reserve and not the training.

    Args:
        local_rank: Number of this worker among those of its host.
        local_size: Number of the workers of this host.
    """
    asked = threading.Event()

    def start() -> None:
        try:
            if local_rank == 0:
                _be_present()
            if _spare_bytes() >= local_size * RESERVE_BYTES:
                ray_internals.start_idle_process()
        except Exception as error:  # of Ray's gRPC, of /proc
            logger.warning(f"no process in reserve on {socket.gethostname()}: {error}")

    def ask() -> None:
        if not asked.is_set():
            asked.set()
            timer = threading.Timer(DELAY_SECONDS, start)
            timer.daemon = True
            timer.start()

    return ask


def import_ahead() -> None:
    """Imports what a worker needs, which takes seconds, at the lowest priority, and watches over this process then."""
    importing = threading.Thread(target=_import, daemon=True)
    importing.start()
    importing.join()  # what Ray sends meanwhile waits
    threading.Thread(target=_watch, daemon=True, name="reserve").start()


def _import() -> None:
    # Of this thread alone: a process may not raise its priority again.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with contextlib.suppress(Exception):  # the worker imports it again, and says what is wrong
        import pipeline.training.fit
        import pipeline.workers.train  # noqa: F401


def _watch() -> None:
    """Ends this process when nobody needs it in reserve any more."""
    time.sleep(POLL_SECONDS)  # Ray may have given it to an actor that is about to be made
    last_seen = time.monotonic()
    while ray_internals.is_idle():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(POLL_SECONDS)
            connection.connect(_name())
            while ray_internals.is_idle() and _spare_bytes() >= 0:
                with contextlib.suppress(TimeoutError):
                    connection.recv(1)  # returns, or raises, when the workers are gone
                    break
                last_seen = time.monotonic()
        is_over = time.monotonic() - last_seen > GRACE_SECONDS or _spare_bytes() < 0
        if is_over and ray_internals.is_idle():
            os._exit(0)
        time.sleep(1)


def _be_present() -> None:
    """Lets the processes in reserve on this host see that there are workers, as long as this process lives."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_name())
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:  # another training of this job is seen here already
            raise
        return
    listener.listen(_BACKLOG)
    _present.append(listener)


def _name() -> str:
    """An address that is no file and goes away with its process, of the workers of this job on this host."""
    return f"\0perceiver-workers-{os.getuid()}-{ray_internals.job_name()}"


def _spare_bytes() -> int:
    """Memory that this host, and the container of this process, can give away and keep `SPARE_SHARE` of theirs free."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (1024 * int(rows[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    spare = [free - SPARE_SHARE * total]
    for limit, used, statistics in _CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such control group, or one without a limit
            most, taken = int(Path(limit).read_text()), int(Path(used).read_text())
            counts = dict(line.split() for line in Path(statistics).read_text().splitlines())
            files = counts.get("total_inactive_file") or counts["inactive_file"]  # the kernel frees them when it must
            spare.append(most - taken + int(files) - SPARE_SHARE * min(most, total))
    return int(min(spare))
