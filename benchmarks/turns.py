"""Contestants that take turns: each a process of its own, only one of them at work at any time.

Side by side means A B A B here, so that whatever else the machine does meets all contestants alike.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Protocol


class Answer(Protocol):
    """What a contestant calls when its turn is over: hands the result over and waits for the next turn."""

    def __call__(self, result: Any) -> None: ...


class Contestant:
    """A case in a fresh process, which computes only while `turn` waits for it.

    Args:
        case: called in the process as `case(answer, *arguments)`. It calls `answer` once when it is set up, then once
            a turn, without end.
        arguments: its further arguments; all that goes to a process or comes from it must be picklable.
    """

    def __init__(self, case: Callable[..., None], *arguments: Any) -> None:
        # Not forked: TensorFlow's threads, and the memory that the parent holds, would come along.
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_play, args=(theirs, case, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that `wait` ends when the process does

    def wait(self) -> Any:
        """What the process answers next.

        Raises:
            RuntimeError: if it died instead.
        """
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a contestant ended with exit code {self._process.exitcode}, see its messages"
            ) from None

    def begin(self) -> None:
        """Lets the process take a turn; `wait` gives the result."""
        self._connection.send(True)

    def turn(self) -> Any:
        self.begin()
        return self.wait()

    def end(self) -> None:
        self._connection.close()
        self._process.join(timeout=2)
        self._process.kill()  # the threads of TensorFlow may keep a process that has nothing left to do
        self._process.join()


def medians(turns: Iterable[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    turns = list(turns)
    return statistics.median(turns), min(turns), max(turns)


def _play(connection: Connection, case: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    def answer(result: Any) -> None:
        connection.send(result)
        try:
            connection.recv()
        except EOFError:
            raise SystemExit from None  # `end` was called, or the parent is gone

    case(answer, *arguments)
