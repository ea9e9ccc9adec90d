"""Files and folders that another user has closed are named with the remedy, in every place where they are read."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.command import run_command
from pipeline.storage import Storage

ROOT = Path(__file__).parents[1]
CODE = """if True:
    import io, sys
    from pathlib import Path
    from pipeline.clean import CleanOptions, clean
    from pipeline.command import run_command
    from pipeline.data.labelled_images import list_images
    from pipeline.driver.drive import drive
    from pipeline.registry.fetch import RegisteredModel
    from pipeline.settings.command_line import parse

    root = sys.argv[1]

    def dry_run():
        return drive(*parse(["quickstart", "--dry-run", "--storage", f"{root}/closed"]))

    def own_storage():
        return drive(*parse(["quickstart", "--storage", f"{root}/foreign"]))

    commands = {
        "csv": lambda: list_images(f"{root}/csv"),
        "tar": lambda: list_images(f"{root}/tar"),
        "npz": lambda: list_images(f"{root}/npz"),
        "parquet": lambda: list_images(f"{root}/parquet"),
        "model": lambda: RegisteredModel.from_folder(Path(f"{root}/model"), "folder"),
        "clean": lambda: clean(CleanOptions(f"{root}/closed")),
        "dry-run": dry_run,
        "foreign": own_storage,
    }
    err = sys.stderr
    for name, command in commands.items():
        sys.stderr = io.StringIO()
        code, said = run_command(command), sys.stderr.getvalue()
        print(f"{name} {code} {said!r}", file=err)
"""


def test_what_another_user_has_closed_is_named(tmp_path: Path) -> None:
    """Without the right of root to read and write everything."""
    files = {"csv": "metadata.csv", "tar": "a.tar", "npz": "a.npz", "parquet": "a.parquet", "model": "MLmodel"}
    for folder, file in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(b"closed")
        (tmp_path / folder / file).chmod(0)
    (tmp_path / "csv" / "a.png").write_bytes(b"")
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "foreign").mkdir(mode=0o555)
    without = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if without and shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv, to give up rights of root")
    command = [*without, sys.executable, "-c", CODE, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    (tmp_path / "closed").chmod(0o755)
    said = dict(line.split(" ", 1) for line in result.stderr.splitlines())
    assert said.keys() == {*files, "clean", "dry-run", "foreign"}, result.stderr
    for name, text in said.items():
        code, message = text.split(" ", 1)
        assert code == ("1" if name in ("clean", "dry-run") else "2"), text
        assert "error: " in message
        assert "Permission denied" in message, text
        assert str(tmp_path / ("closed" if name in ("clean", "dry-run") else name)) in message, text
        assert "Traceback" not in message
        assert message.count("\\n") == 1, "one line"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(28, "No space left on device", "/a"),
            "error: [Errno 28] No space left on device: '/a': make room there",
        ),
        (OSError(116, "Stale file handle", "/a"), "error: [Errno 116] Stale file handle: '/a': mount it again"),
        (OSError("of a library"), "Traceback (most recent call last)"),
        (OSError(22, "Invalid argument"), "Traceback (most recent call last)"),
    ],
)
def test_errors_of_the_operating_system_come_with_a_remedy(
    error: OSError, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def fail() -> int:
        raise error

    assert run_command(fail) == 1
    assert capsys.readouterr().err.startswith(expected)


def test_an_error_of_an_object_store_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of a store that refuses from one moment on what it allowed before, as when rights have been taken back."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-tests-alone")

    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    def read() -> int:
        return Storage(uri).read_json("manifest.json")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        uri = f"s3://bucket/runs?endpoint_override=127.0.0.1:{store.server_port}&scheme=http&region=us-east-1"
        try:
            assert run_command(read) == 1
        finally:
            store.shutdown()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "manifest.json" in said
    assert "look at the object store and at the rights of this login there" in said
