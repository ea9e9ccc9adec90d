"""The first contact with a folder, a file or an object store that may never answer.

A process of its own asks: a call to a dead network folder can be ended in no other way, and a thread that is stuck in
one keeps its process from ending. Where the kernel does not let that process go either, it is left behind.
"""

import contextlib
import os
import signal
import subprocess
import sys

CONTACT_SECONDS = 10.0
"""How long a place may take to answer at first; the libraries of the clouds try for a quarter of an hour, and the
kernel asks the server of a network folder without end."""

_IMPORT_SECONDS = 30.0
"""How long Python may take to import pyarrow, which took 1.4 s, before an object store is asked."""

MAY_HANG = "may hang: "
"""How the names of threads begin that may wait for a server when the command ends; see `pipeline.command.end`."""

_ASK_STORE = """
import signal, sys, pyarrow.fs
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))  # SIGALRM ends this process, in the midst of a call too
filesystem, path = pyarrow.fs.FileSystem.from_uri(sys.stdin.buffer.read().decode())
filesystem.get_file_info(path)
"""

# The place and, if wanted, what is mounted below it, each of which is named before it is asked. Whatever else is wrong
# with them is said where they are used.
_ASK_PATH = rb"""
import os, re, stat, sys

def ask(path):
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            with os.scandir(path) as entries:
                next(entries, None)
        elif stat.S_ISREG(mode):
            with open(path, "rb", 0) as file:
                file.read(1)
    except OSError:
        pass

asked = sys.stdin.buffer.read()
os.write(1, asked + b"\0")
ask(asked)
root = os.path.realpath(asked)
try:
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split()[4] for line in file]
except OSError:
    points = []
for point in points if sys.argv[1] == "tree" else ():
    point = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), point)
    if point.startswith(root.rstrip(b"/") + b"/"):
        os.write(1, point + b"\0")
        ask(point)
""".decode()


def problem_of_file_uri(uri: str) -> str | None:
    """Why a `file:` URI names a host or a folder below the current one, and the remedy; None if it does not."""
    if uri.startswith("file:") and not uri.startswith("file:///"):
        return "is no URI of a folder: give the path, or file:///PATH"
    return None


def problem_of_home(path: str) -> str | None:
    """Why `~` or `~user` at the start of a path stands for no folder, and the remedy; None if it does, or is not there.

    Python leaves such a path as it is, and it would name a folder below the current one.
    """
    if path.startswith("~") and os.path.expanduser(path) == path:
        return "is in the home of a user whom this host does not know: give a path"
    return None


def check_path(path: str, option: str, tree: bool = False) -> None:
    """Checks that the file system of a path on this host answers.

    Args:
        path: a folder or a file, which need not be there.
        option: name of the option that gave `path`, for messages.
        tree: whether those that are mounted below it must answer too.

    Raises:
        ValueError: if one does not answer within `CONTACT_SECONDS`.
    """
    place = os.path.abspath(os.path.expanduser(path))
    try:
        # Without the modules of a site, which may lie in the folder of a user that does not answer.
        _ask(["-I", "-S", "-c", _ASK_PATH, "tree" if tree else "path"], os.fsencode(place))
    except subprocess.TimeoutExpired as silent:
        found = os.fsdecode((silent.output or b"").rstrip(b"\0").rpartition(b"\0")[2])
        where = f"the file system mounted at {found}" if found not in ("", place) else "its file system"
        raise ValueError(
            f"{option} = {path!r} has not answered within {CONTACT_SECONDS:g} s: {where} hangs, perhaps a network "
            "folder whose server is gone (`mount` lists them): mount it again, or give another path"
        ) from None
    except OSError:
        return  # no process can be started: what follows says why, or does without


def check_store(uri: str, option: str) -> str | None:
    """Asks an object store for its root; returns why it refuses, or None if it answers.

    Args:
        uri: a URI that `pyarrow.fs` takes.
        option: name of the option that gave `uri`, for messages.

    Raises:
        ValueError: if it does not answer within `CONTACT_SECONDS`.
    """
    try:
        # The URI may hold a key: it is no argument.
        arguments = ["-P", "-c", _ASK_STORE, str(CONTACT_SECONDS)]
        code, said = _ask(arguments, uri.encode(), CONTACT_SECONDS + _IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        code, said = -signal.SIGALRM, ""
    if code == -signal.SIGALRM:
        raise ValueError(
            f"{option} = {uri!r} has not answered within {CONTACT_SECONDS:g} s: check that this machine reaches it, "
            "and that the URI names the right endpoint and region"
        )
    return (said.strip().rpartition("\n")[2] or f"the process that asked ended with code {code}") if code else None


def _ask(arguments: list[str], text: bytes, seconds: float | None = None) -> tuple[int, str]:
    """Runs Python with `arguments` and `text` as its input; returns its exit code and what it said of errors.

    Raises:
        subprocess.TimeoutExpired: after so many seconds, or `CONTACT_SECONDS`; holds what it has written.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        _, said = process.communicate(text, CONTACT_SECONDS if seconds is None else seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        # Not longer: the kernel may keep it until a server answers.
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            process.returncode = -signal.SIGKILL  # so that the object does not complain of it
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        raise
    return process.returncode, said.decode(errors="replace")
