"""Contestants of a benchmark: each case runs in its own process, and the cases compute in turns.

The turns are interleaved (A B A B ...), so that a change in the load of the machine affects all cases alike.
"""

import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Protocol


class Answer(Protocol):
    """Callback of a contestant: sends the result of a turn, then waits until the next turn begins."""

    def __call__(self, result: Any) -> None: ...


class Contestant:
    """A case in a new process, which computes only during its turns.

    Args:
        case: Called in the process as `case(answer, *arguments)`. It calls `answer` once after its set-up and then once
            per turn, until `end` stops it.
        arguments: Further arguments of `case`. Everything that is sent to or from the process must be picklable.
    """

    def __init__(self, case: Callable[..., None], *arguments: Any) -> None:
        # Not forked, because a fork would inherit the parent's memory and TensorFlow's threads.
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_play, args=(theirs, case, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that `wait` ends when the process does

    def wait(self) -> Any:
        """Waits for the next answer of the process.

        Raises:
            RuntimeError: if the process ended instead.
        """
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a contestant ended with exit code {self._process.exitcode}, see its output above"
            ) from None

    def begin(self) -> None:
        """Lets the process begin a turn; `wait` returns its result."""
        self._connection.send(True)

    def turn(self) -> Any:
        """Runs one turn and returns its result."""
        self.begin()
        return self.wait()

    def end(self) -> None:
        """Ends the process, also in the middle of a turn."""
        self._connection.close()
        self._process.join(timeout=2)
        self._process.kill()  # threads of TensorFlow may keep a finished process alive
        self._process.join()

    def kill(self) -> None:
        """Ends the process from another thread than that which waits for it: `wait` raises its error there."""
        self._process.kill()


def medians(turns: Iterable[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum."""
    turns = list(turns)
    return statistics.median(turns), min(turns), max(turns)


def _play(connection: Connection, case: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C the parent ends it, without a traceback of its own

    def answer(result: Any) -> None:
        connection.send(result)
        try:
            connection.recv()
        except EOFError:
            raise SystemExit from None  # `end` was called, or the parent process has ended

    case(answer, *arguments)
