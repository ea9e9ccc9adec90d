"""What a shell can give a command: closed or full outputs, a pipe without a reader, other encodings and modules."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
RUN = f"{sys.executable} {ROOT}/pipeline/run.py"
PLAN = f"{RUN} quickstart --dry-run --storage /nowhere"


def shell(script: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script; its last line `$?` of the command is the exit code."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(["bash", "-c", script], cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("script", "code", "error"),
    [
        (f"{PLAN} >&- <&-", 0, ""),
        (f"{PLAN} >&- 2>&-", 0, ""),
        (f"{PLAN} | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        (f"{RUN} --help | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        (f"{PLAN} > /dev/full", 1, "error: the output cannot be written: [Errno 28] No space left on device\n"),
        (f"{RUN} nope 2> /dev/full", 2, ""),
    ],
)
def test_an_output_that_nobody_takes(script: str, code: int, error: str) -> None:
    result = shell(script)
    assert (result.returncode, result.stderr) == (code, error)


def test_a_file_does_not_become_the_output_that_the_shell_closed(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from pipeline.command import run_command

        def command():
            with open(sys.argv[1], "w") as file:
                os.write(1, b"what a library prints")
                file.write("mine")
            return 0

        sys.exit(run_command(command))
    """
    (tmp_path / "code.py").write_text(code)
    assert shell(f"{sys.executable} code.py file 0>&- 1>&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_warning_of_a_library_that_is_an_error_comes_with_a_remedy(tmp_path: Path) -> None:
    code = """if True:
        import sys, warnings
        from pipeline.command import run_command

        sys.exit(run_command(lambda: warnings.warn("old name", FutureWarning)))
    """
    (tmp_path / "code.py").write_text(code)
    result = shell(f"{sys.executable} code.py", tmp_path, PYTHONWARNINGS="error")
    assert result.returncode == 2
    assert result.stderr == (
        "error: a library warned, and warnings are errors for this Python: old name (FutureWarning): unset "
        "PYTHONWARNINGS, and give no -W error\n"
    )


def test_names_of_files_in_another_encoding_are_refused() -> None:
    result = shell(PLAN, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 2
    assert result.stderr == (
        "error: the locale C gives names of files the encoding ascii, in which other processes would read other "
        "names: set LC_ALL=C.UTF-8, or PYTHONUTF8=1\n"
    )


def test_an_output_of_few_characters_shows_the_others_in_ascii(tmp_path: Path) -> None:
    for name in ("F\xfcchse \U0001f98a", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    options = f"--data.source files --data.path {tmp_path}/images --train.global-batch-size 8"
    for name, value in (("LC_ALL", "C"), ("PYTHONIOENCODING", "ascii")):
        result = shell(f"{name}={value} {PLAN} {options}", PYTHONWARNINGS="error", PYTHONOPTIMIZE="2")
        assert (result.returncode, result.stderr) == (0, "")
        assert "chse" in result.stdout
    assert "F\\xfcchse \\U0001f98a" in result.stdout


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    result = shell(f"rmdir {folder}; {PLAN}", folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the current folder is gone (")
    assert result.stderr.count("\n") == 1 + result.stderr.startswith("shell-init")


def test_modules_of_other_programs_with_the_names_of_this_one(tmp_path: Path) -> None:
    for name in ("tune", "pipeline", "perceiver"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign')")
    shutil.copytree(tmp_path, tmp_path / "beside")
    for plan in (PLAN, f"PYTHONSAFEPATH=1 {PLAN}"):
        result = shell(plan, tmp_path / "beside", PYTHONPATH=str(tmp_path))
        assert (result.returncode, result.stderr) == (0, "")


def test_no_folder_for_temporary_files_is_said() -> None:
    script = "for folder in /tmp /var/tmp /usr/tmp /mnt; do [ ! -d $folder ] || mount -t tmpfs -o ro tmpfs $folder || "
    script += "exit 99; done; cd /mnt; "
    hidden = [path for path in (ROOT, Path(sys.executable)) if path.parts[1] in ("tmp", "mnt")]
    if hidden or shell("unshare -m mount -t tmpfs -o ro tmpfs /mnt").returncode:
        pytest.skip(f"folders cannot be mounted over here, or hide {hidden}")
    result = shell(f"unshare -m bash -c '{script} exec {PLAN}'", TMPDIR="/nowhere")
    assert result.returncode == 2
    assert re.fullmatch(r"error: there is no folder for temporary files \(.*\): set TMPDIR to one .*\n", result.stderr)
