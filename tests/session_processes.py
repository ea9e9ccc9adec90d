"""The processes that the tests have started, recognised by an environment variable that they inherit."""

import contextlib
import os
import signal
import time
from pathlib import Path


def kill_cluster(folder: Path) -> None:
    """Kills this session's processes whose RAY_TMPDIR is `folder`; `ray start` itself takes half a minute to end."""
    while found := [process for process in processes_of_this_session() if _has_folder(process, folder)]:
        for process in found:  # one of them may have started another meanwhile
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _has_folder(process: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return f"RAY_TMPDIR={folder}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return False


def processes_of_this_session() -> dict[int, str]:
    """Process id and command line of all that descend from this process, even where their parents are gone."""
    found, session = {}, os.environ["PERCEIVER_TEST_SESSION"]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"PERCEIVER_TEST_SESSION={session}".encode() in (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # ended meanwhile, or another user's
            continue
        # A zombie has no command line; the resource tracker of multiprocessing ends with this process.
        if ours and command and "resource_tracker" not in command and int(process.name) != os.getpid():
            found[int(process.name)] = command
    return found
