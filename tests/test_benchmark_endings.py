"""Benchmarks end at a signal with what they have started, without a traceback, and say what the user did wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_run import BENCHMARKS

# A contestant that never answers.
CONTESTANT = """
import os, time
from pathlib import Path
from ending import run_benchmark
from turns import Contestant

def case(answer):
    Path("started").write_text(str(os.getpid()))
    time.sleep(600)

def main():
    contestant = Contestant(case)
    try:
        contestant.wait()
    finally:
        contestant.end()

if __name__ == "__main__":
    run_benchmark(main)
"""
# A pipeline that saves its state at the first signal and ends at once at a second one.
PIPELINE = """
import sys
from pathlib import Path
from ending import run_benchmark, run_pipeline

CHILD = '''
import os, signal, sys, time
from pathlib import Path
def note(number, _):
    with open("signals", "a") as file:
        file.write(f"{number} ")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
Path("started").write_text(str(os.getpid()))
while not Path("signals").exists():
    time.sleep(0.01)
time.sleep(0.3)
'''
run_benchmark(lambda: run_pipeline([sys.executable, "-c", CHILD]))
"""
# Four trainings, one at a time.
ABLATIONS = """
import os, sys, time
from pathlib import Path

def training(answer, config, steps, seed):
    with open("trainings", "a") as file:
        file.write("x")
    Path("started").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    import ablations
    ablations.train_and_validate = training
    sys.argv = ["ablations.py", "digits", "--equal", "steps", "--jobs", "1"]
    ablations.run_benchmark(ablations.main)
"""


def started(script: str, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A benchmark in a session of its own, and the process that it has started."""
    # A shell ignores Ctrl-C for what it starts in the background, and so would all that this process starts.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (folder / "script.py").write_text(heard + script)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "started").is_file() or not (folder / "started").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, int((folder / "started").read_text())


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        pytest.param(CONTESTANT, signal.SIGTERM, 143, id="contestant, SIGTERM"),
        pytest.param(CONTESTANT, signal.SIGINT, 130, id="contestant, Ctrl-C"),
        pytest.param(PIPELINE, signal.SIGTERM, 143, id="pipeline, SIGTERM"),
        pytest.param(PIPELINE, signal.SIGINT, 130, id="pipeline, Ctrl-C"),
        pytest.param(ABLATIONS, signal.SIGTERM, 143, id="ablations, SIGTERM"),
    ],
)
def test_a_signal_ends_a_benchmark_and_what_it_has_started(
    script: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process, child = started(script, tmp_path)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        has_outlived = Path(f"/proc/{child}").exists()
        for kill, identity in ((os.killpg, process.pid), (os.kill, child)):
            with contextlib.suppress(ProcessLookupError):
                kill(identity, signal.SIGKILL)
        process.communicate()
    assert (process.returncode, "Traceback" in errors) == (code, False), errors
    assert not has_outlived
    if script is PIPELINE:
        assert (tmp_path / "signals").read_text() == f"{signal.SIGTERM:d} ", "a second signal would end it at once"
    if script is ABLATIONS:
        assert (tmp_path / "trainings").read_text() == "x", "the others are not begun"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("scaling", "--record", "missing.jsonl"), "error: the record missing.jsonl cannot be read: No such file"),
        (("search_table", "missing"), "error: missing has no search"),
        (("ablations", "paper"), "error: this study needs --archive"),
        (("streaming", "--cache", "cache", "--rows", "100"), "error: --rows 100: give at least the 256 of a batch"),
        (("comparison", "--record", "r.jsonl", "--pflop", "inf"), "error: --pflop inf: give positive budgets"),
        (("comparison", "--record", "r.jsonl", "--", "--model.num-latents", "4"), "changes none of these models"),
        (("train_overhead", "--feeds", "tfdata"), "invalid choice: 'tfdata'"),
    ],
)
def test_what_the_user_did_wrong_is_one_message(command: tuple[str, ...], message: str, tmp_path: Path) -> None:
    name, *options = command
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
