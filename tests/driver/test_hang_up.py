"""A driver whose terminal is gone goes on, and writes to a file of its own that nobody else has prepared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, shutil, signal, sys
from pipeline.driver.drive import _outlive_terminal

class Progress:
    def hang_up(self):
        print("hung up", flush=True)

folder, plant = sys.argv[1:]
_outlive_terminal(Progress())
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


@pytest.mark.parametrize("plant", ["link", "file", "folder", "no folder"])
def test_the_output_goes_to_a_new_file(plant: str, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-c", SCRIPT, str(folder), plant]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 7, result.stderr
    assert result.stdout == result.stderr == ""
    if plant == "no folder":
        return
    assert (folder / "precious").read_text() == "mine"
    (log,) = folder.glob("perceiver-pipeline-*-*.log")
    assert log.read_text() == "hung up\ngoes on\n"
    assert log.stat().st_mode & 0o777 == 0o600
