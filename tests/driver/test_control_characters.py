"""Names that strangers chose reach no terminal as commands to it."""

import io
import sys

import pytest
from rich.markup import escape

from pipeline.command import say_error
from pipeline.driver.progress import Progress, _Console, make_console
from pipeline.settings.presets import quickstart

NAME = "x\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.jpg"
SHOWN = r"x\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.jpg"


def test_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    say_error(f"error: {NAME}:\n\tsecond line, café \U0001f600")
    assert capsys.readouterr().err == f"error: {SHOWN}:\n\tsecond line, café \U0001f600\n"


def test_on_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print(escape(NAME))
    assert capsys.readouterr().out == SHOWN + "\n"


def test_in_a_line_of_progress() -> None:
    out = io.StringIO()
    Progress(quickstart(), _Console(file=out, width=200)).say(escape(NAME))
    assert SHOWN in out.getvalue()
    assert sys.stdout is not out
