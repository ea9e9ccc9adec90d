"""Runs commands, in the foreground or in the background, and records their output."""

import os
import re
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Output:
    """Exit code, output and duration of a command."""

    code: int
    text: str
    seconds: float


class Background:
    """A command that runs while the test does something else.

    Args:
        folder: Folder for the log of the output.
        terminal: Whether the command runs in a terminal.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        cwd: Path,
        environment: dict[str, str],
        folder: Path,
        terminal: bool = False,
    ) -> None:
        if terminal:
            command = [
                "script",
                "--quiet",
                "--flush",
                "--return",
                "--command",
                shlex.join(map(str, command)),
                "/dev/null",
            ]
        self._start, self.log = time.monotonic(), folder / f"command-{secrets.token_hex(4)}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.PIPE,  # `ray dashboard` ends when there is no more input
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """The output so far."""
        return plain(self.log.read_text(errors="replace"))

    def type(self, keys: bytes) -> None:
        """Sends `keys` to the terminal of the command."""
        assert self._process.stdin is not None
        self._process.stdin.write(keys)
        self._process.stdin.flush()

    def wait_for(self, pattern: str, seconds: float) -> re.Match[str]:
        """Waits until `pattern` matches the output."""

        def said() -> bool:
            assert re.search(pattern, self.text) or self._process.poll() is None, f"no {pattern!r} in\n{self.text}"
            return re.search(pattern, self.text) is not None

        wait_until(said, seconds, f"{pattern!r} is not in\n{self.text}")
        found = re.search(pattern, self.text)
        assert found is not None
        return found

    def wait(self, seconds: float) -> Output:
        """Waits until the command ends."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the command takes more than {seconds:g} s:\n{self.text}") from None
        self.kill()
        return Output(self._process.returncode, self.text, time.monotonic() - self._start)

    def kill(self) -> None:
        """Kills the command and its child processes. Does nothing if it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def wait_until(condition: Callable[[], object], seconds: float, complaint: str, pause: float = 0.2) -> float:
    """Waits until `condition()` holds; returns how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{complaint} within {seconds:g} s"
        time.sleep(pause)
    return time.monotonic() - start


def run(
    command: Sequence[str | Path], *, timeout: float, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> Output:
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        raise AssertionError(f"{command} took more than {timeout:g} s:\n{text}") from None
    return Output(process.returncode, plain(text), time.monotonic() - start)


def plain(text: str) -> str:
    """`text` without escape sequences of a terminal and carriage returns."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)
