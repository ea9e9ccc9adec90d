"""How every command of the project ends: its exit code, and one message on standard error."""

import atexit
import contextlib
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


def run_command(command: Callable[[], int]) -> int:
    """Runs a command; returns its exit code: that of `command`, 2 after a ValueError, 1 after a DeviceError, 130
    after Ctrl-C.

    Any other error is a fault of the project: its traceback is printed, and the exit code is 1.
    """
    # What the parser of the command line, warnings and loggers print is masked too.
    sys.stdout, sys.stderr = _Masked(sys.stdout), _Masked(sys.stderr)
    try:
        _set_environment()
        return command()
    except ValueError as error:
        say_error(f"error: {error}")
        return 2
    except DeviceError as error:
        say_error(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        say_error(traceback.format_exc())
        return 1


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
    """A stream that hides the passwords and keys in what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _set_environment() -> None:
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
