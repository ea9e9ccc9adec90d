"""How every command of the project ends: its exit code, and one message on standard error."""

import atexit
import contextlib
import errno
import io
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.contact import MAY_HANG, check_path
from pipeline.devices import DeviceError
from pipeline.masking import mask, printable

# The libraries read these when they are imported. What the user has set takes precedence.
ENVIRONMENT = {
    # Neither library shall call home from somebody's cluster unless told to.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # Seconds for which a driver tries to join a cluster; only a wrong token takes as long.
    "RAY_NUM_REDIS_GET_RETRIES": "5",
}


_RIGHTS = "give this user the right to it, or another path"
_ROOM = "make room there, and give the command again"
_AWAY = "mount it again, and give the command again"
REMEDIES = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EBUSY: "give the command again",
    errno.EIO: "look at the disk, of which the system log says more",
    errno.ESTALE: _AWAY,
    errno.ENOTCONN: _AWAY,
    errno.EMFILE: "allow more open files (`ulimit -n 4096`)",
    errno.ENFILE: "allow more open files on this machine",
}
"""What a person can do about errors of the operating system, which name the file, by their numbers."""
_OF_STORE = "look at the object store and at the rights of this login there, and give the command again"


def run_command(command: Callable[[], int]) -> int:
    """Runs a command; returns its exit code: that of `command`, 2 after a ValueError or a warning that is an error, 1
    after a DeviceError or an error of an object store, or of the operating system if `REMEDIES` knows it, 130 after
    Ctrl-C.

    Any other error is a fault of the project: its traceback is printed, and the exit code is 1.
    """
    _open_standard_streams()
    # What the parser of the command line, warnings and loggers print is masked too.
    output, sys.stderr = _Masked(sys.stdout), _Masked(sys.stderr)
    sys.stdout = output
    try:
        code = _code_of(command)
    finally:  # the parser ends the process itself
        output.flush()
        sys.stderr.flush()
    if output.lost and output.lost.errno != errno.EPIPE:  # whoever closes a pipe has read enough
        say_error(f"error: the output cannot be written: {output.lost}")
        return code or 1
    return code


def _code_of(command: Callable[[], int]) -> int:
    try:
        _check_process()
        set_environment()
        return command()
    except ValueError as error:
        say_error(f"error: {error}")
        return 2
    except DeviceError as error:
        say_error(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        known = _OF_STORE if _is_of_store(error) else REMEDIES.get(error.errno or 0)
        say_error(f"error: {error}: {known}" if known else traceback.format_exc())
        return 1
    except Warning as warning:
        say_error(
            f"error: a library warned, and warnings are errors for this Python: {warning} ({type(warning).__name__}): "
            "unset PYTHONWARNINGS, and give no -W error"
        )
        return 2
    except Exception:
        say_error(traceback.format_exc())
        return 1


def _is_of_store(error: OSError) -> bool:
    """Whether pyarrow raised an error for an object store: without a number, and it names the key and the answer."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return error.errno is None and Path(raised_in).parent.name == "pyarrow"


def _open_standard_streams() -> None:
    """Opens those that the shell has closed, which the next file that is opened would become, be it a database."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _check_process() -> None:
    """Checks what the process was given by the shell.

    Raises:
        ValueError: if names of files would not be those that others see, the current folder is gone, or a folder for
            temporary files does not answer or is not there.
    """
    encoding = sys.getfilesystemencoding()
    if encoding.lower() != "utf-8":
        locale = next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "C")
        raise ValueError(
            f"the locale {locale} gives names of files the encoding {encoding}, in which other processes would read "
            "other names: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError(f"the current folder is gone ({error}): change to another one") from error
    for name in ("TMPDIR", "RAY_TMPDIR"):
        if folder := os.environ.get(name):
            check_path(folder, name)
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise ValueError(f"there is no folder for temporary files ({error}): set TMPDIR to one with room") from error


def end(code: int) -> NoReturn:
    """Ends the process though a thread may still wait for a server: Python would join the threads of its libraries."""
    if any(thread.name.startswith(MAY_HANG) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        atexit._run_exitfuncs()  # what Ray has started is ended there
        os._exit(code)
    sys.exit(code)


class _Masked:
    """A stream that hides the passwords and keys in what is written to it, and does not fail when nobody takes it.

    A run of hours goes on although the terminal, the pipe or the disk of its output is gone.

    Attributes:
        lost: Why what was written is lost; None if it is not.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters shows the others so

    def write(self, text: str) -> int:
        try:
            self._stream.write(mask(text))
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        with contextlib.suppress(OSError, ValueError):
            # What waits in the stream is written once more when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A cluster that `ray start` has started wants the token of its user if there is one; a driver would not send it.
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _has_token() -> bool:
    """Whether this user has a token for Ray clusters, where Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    place = given or os.path.expanduser("~/.ray/auth_token")
    check_path(place, "RAY_AUTH_TOKEN_PATH" if given else "HOME")
    return Path(place).is_file()


@contextlib.contextmanager
def libraries_to_log() -> Iterator[None]:
    """Sends what the libraries and their C++ write to standard error to a file, whose path is said if the block fails.

    Of TensorFlow's and Ray's notes on this machine's processors and devices nothing concerns the person who waits.
    """
    sys.stderr.flush()
    descriptor, path = tempfile.mkstemp(prefix="perceiver-", suffix=".log")
    terminal = os.dup(2)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    failed = True
    try:
        yield
        failed = False
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        if failed and os.path.getsize(path):
            say_error(f"what the libraries said: {path}")
        else:
            os.unlink(path)


def say_error(text: str) -> None:
    """Prints `text` to standard error, without the passwords, keys and control characters in it."""
    print(printable(mask(text)), file=sys.stderr)
