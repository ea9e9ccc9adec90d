"""A driver whose terminal is gone goes on, and writes to a file of its own that nobody else has prepared."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, shutil, signal, sys
from pipeline.driver.hang_up import outlive_terminal

class Progress:
    def hang_up(self):
        print("hung up", flush=True)

folder, plant = sys.argv[1:]
outlive_terminal(Progress())
name = f"{folder}/perceiver-pipeline-{os.getpid()}.log"
if plant == "link":
    os.symlink(f"{folder}/precious", name)
elif plant == "file":
    open(name, "w").close()
    os.chmod(name, 0o666)
elif plant == "folder":
    os.mkdir(name)
else:
    import tempfile
    tempfile.gettempdir()
    shutil.rmtree(folder)
for _ in range(2):
    os.kill(os.getpid(), signal.SIGHUP)
print("goes on", flush=True)
os._exit(7)
"""

COMMAND = [sys.executable, "-c", SCRIPT]
# These tests may themselves have been started with nohup.
run = functools.partial(
    subprocess.run, timeout=60, text=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
)


@pytest.mark.parametrize("plant", ["link", "file", "folder", "no folder"])
def test_the_output_goes_to_a_new_file(plant: str, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    environment = os.environ | {"TMPDIR": str(folder)}
    result = run([*COMMAND, str(folder), plant], capture_output=True, env=environment)
    assert result.returncode == 7, result.stderr
    assert result.stdout == result.stderr == ""
    if plant == "no folder":
        return
    assert (folder / "precious").read_text() == "mine"
    (log,) = folder.glob("perceiver-pipeline-*-*.log")
    assert log.read_text() == "hung up\ngoes on\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_an_output_that_was_sent_to_a_file_stays_there(tmp_path: Path) -> None:
    out, environment = tmp_path / "mine", os.environ | {"TMPDIR": str(tmp_path)}
    with out.open("w") as file:
        result = run([*COMMAND, str(tmp_path), "folder"], stdout=file, stderr=file, env=environment)
    assert (result.returncode, out.read_text()) == (7, "goes on\n")
    assert list(tmp_path.glob("perceiver-pipeline-*-*.log")) == []


def test_of_two_outputs_only_the_one_that_is_no_file_moves(tmp_path: Path) -> None:
    out, environment = tmp_path / "mine", os.environ | {"TMPDIR": str(tmp_path)}
    with out.open("w") as file:
        result = run([*COMMAND, str(tmp_path), "folder"], stdout=file, stderr=subprocess.PIPE, env=environment)
    assert (result.returncode, result.stderr, out.read_text()) == (7, "", "hung up\ngoes on\n")
    assert [log.read_text() for log in tmp_path.glob("perceiver-pipeline-*-*.log")] == [""]


def test_nohup_keeps_its_meaning(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    result = run(["nohup", *COMMAND, str(tmp_path), "folder"], capture_output=True, env=environment)
    assert (result.returncode, result.stdout) == (7, "goes on\n"), result.stderr
    assert list(tmp_path.glob("perceiver-pipeline-*-*.log")) == []
