"""Processor time of commands, for limits that hold beside other tests, whose work lengthens the time of the clock."""

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 60.0
"""Seconds after which a command that computes for at most a few of them must have waited for something."""


def run_timed(*command: object, **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs Python with the arguments `command` in the root of the project.

    Args:
        command: Arguments of Python, e.g. a script and its own arguments.
        variables: Further environment variables.

    Returns:
        The result with its outputs, and the seconds of processor time that the process and its children took.

    Raises:
        subprocess.TimeoutExpired: if it has not ended after `TIMEOUT` seconds.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=TIMEOUT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
