"""How a benchmark ends, and the pipelines that it runs: nothing goes on computing beside the next measurement."""

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline.command import run_command

END_SECONDS = 60
"""Time for a pipeline to stop its workers after SIGTERM."""


def run_benchmark(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and ends the process: with 0 or what it returns, 130 after Ctrl-C, 143 after SIGTERM.

    What the user did wrong, a ValueError, is one message and 2, as with the commands of the pipeline. SIGTERM unwinds
    the stack as Ctrl-C does, so that the processes which the benchmark has started are ended with it.
    """
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(run_command(lambda: main() or 0))


def _exit(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


@contextlib.contextmanager
def stopped_with_this(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is told to stop when the block is left by a signal or an error, and waited for."""
    # In a group of its own, so that Ctrl-C reaches it once: it takes a second signal for impatience and ends at once.
    with subprocess.Popen(command, text=True, process_group=0, **options) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            raise


def run_pipeline(command: Sequence[str], **options: Any) -> None:
    """Runs a command that says itself why it fails.

    Raises:
        SystemExit: with its exit code, if that is not 0.
    """
    with stopped_with_this(command, **options) as process:
        code = process.wait()
    if code:
        print(f"error: it ended with exit code {code}, see above: {' '.join(command)}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def existing_file(text: str) -> Path:
    """Type of an option that names a file."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)
