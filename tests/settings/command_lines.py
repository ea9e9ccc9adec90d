"""Helpers of the tests of the command line: parse arguments, or run them in a process."""

import re
import subprocess
from pathlib import Path

import pytest
from processor_time import run_timed

from pipeline.settings.command_line import parse
from pipeline.settings.config import PipelineConfig

ROOT = Path(__file__).parents[2]
BORDER = re.compile(r"(?:[│╭╮╰╯─|+\s]|-{3,})+")  # of Unicode or of ASCII


def config_of(*argv: str) -> PipelineConfig:
    return parse(argv)[1].config


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message to which `argv` leads, on one line."""
    try:
        parse(argv)
    except ValueError as error:
        return str(error)
    except SystemExit:  # with code 2, as the tests below see from outside
        return BORDER.sub(" ", capsys.readouterr().err)
    pytest.fail(f"{argv} is not refused")


def run(*argv: object, **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """`python pipeline/run.py` with `argv`, and the seconds of processor time that it took."""
    return run_timed("pipeline/run.py", *argv, **variables)
