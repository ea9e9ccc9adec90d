"""A folder or a file on a file system that never answers is refused, and the command ends."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dead_mount import dead_mount

from pipeline import contact
from pipeline.clean import CleanOptions, clean
from pipeline.contact import check_path
from pipeline.data.file_tree import list_files
from pipeline.registry.fetch import resolve
from pipeline.settings.command_line import parse
from pipeline.storage import open_storage
from pipeline.tracking.server import check_server, has_database
from pipeline.training.config import TrainingConfig
from pipeline.workers.streaming import check_streams

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with dead_mount(tmp_path_factory.mktemp("above") / "dead") as folder:
        yield folder


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "CONTACT_SECONDS", 0.6)


@pytest.mark.usefixtures("soon")
def test_every_option_that_names_a_path_is_asked_first(dead: Path) -> None:
    local = "--data.source", "files", "--data.path", str(ROOT / "docs")
    sha256 = "--data.sha256", "0" * 64
    cached = TrainingConfig(cache=f"{dead}/cache")
    asked = {
        "storage": lambda: open_storage(f"{dead}/runs"),
        "output": lambda: open_storage(f"file://{dead}/results", "output"),
        "data.path": lambda: list_files(str(dead), "data.path"),
        "model": lambda: resolve(f"{dead}/model", None),
        "data.archive": lambda: parse(["cifar100", "--data.archive", f"{dead}/a.tar.gz", *sha256]),
        "summary-json": lambda: parse(["quickstart", "--summary-json", f"{dead}/summary.json"]),
        "tracking.uri": lambda: check_server(f"sqlite:///{dead}/mlflow.db"),
        "train.cache": lambda: check_streams({"image_shape": (8, 8, 1)}, ["train"], open_storage("."), cached),
    }
    for option, call in asked.items():
        with pytest.raises(ValueError, match=rf"^{option} = '{dead}.*has not answered within 0.6 s: .* hangs, .*mount"):
            call()
    for call in (  # what is listed as a whole, and what an option has named before
        lambda: list_files(str(dead.parent), "data.path"),
        lambda: clean(CleanOptions(str(dead.parent))),
    ):
        with pytest.raises(ValueError, match=rf"the file system mounted at {dead} hangs"):
            call()
    for call in (
        lambda: parse(["quickstart", *local, "--storage", f"{dead}/runs"]),
        lambda: has_database(f"sqlite:///{dead}/mlflow.db"),
    ):
        with pytest.raises(ValueError, match=rf"= '{dead}.*has not answered"):
            call()


def test_a_path_beside_what_hangs_answers(dead: Path) -> None:
    for path in (dead.parent, dead.parent / "new", Path(__file__)):
        check_path(str(path), "storage")
    assert open_storage(str(dead.parent)).root == str(dead.parent)


def test_the_command_ends_although_the_kernel_keeps_the_process_that_asked(dead: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "pipeline" / "run.py"), "quickstart", "--storage", f"{dead}/runs"]
    environment = os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert result.returncode == 2
    assert f"error: storage = '{dead}/runs' has not answered within 10 s" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 40


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("name", "below"), [("HOME", "/.ray/auth_token"), ("TMPDIR", ""), ("RAY_TMPDIR", "")])
def test_a_folder_of_the_environment_that_hangs_is_named(
    name: str, below: str, dead: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from pipeline.command import run_command

    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv(name, str(dead))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert run_command(lambda: pytest.fail("it goes on")) == 2
    assert f"error: {name} = '{dead}{below}' has not answered" in capsys.readouterr().err


def test_a_command_ends_while_a_thread_waits_for_a_server() -> None:
    code = """if True:
        import atexit, concurrent.futures, socket, threading
        from pipeline.command import end
        from pipeline.contact import MAY_HANG

        ours, _other = socket.socketpair()
        pool = concurrent.futures.ThreadPoolExecutor()  # as the libraries of the clouds have, whose threads are joined
        wait = lambda: pool.submit(ours.recv, 1).result()
        threading.Thread(target=wait, name=f"{MAY_HANG}store", daemon=True).start()
        atexit.register(print, "tidied up")
        print("said", end=" ")
        end(2)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (2, "said tidied up\n", "")
