"""Storage in a folder and in an object store behaves the same, also when a writing process is killed."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.contact import check_store
from pipeline.storage import Storage, open_storage

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["folder", "file", "mock"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A new storage.

    `mock` is Arrow's file system in memory. It has the C++ interface of that of S3 and is not local, so it uses the
    code paths of an object store. Unlike S3 it has folders, and its content is lost with the object.
    """
    uris = {"folder": str(tmp_path / "runs"), "file": f"file://{tmp_path}/runs", "mock": "mock:///bucket/runs"}
    return Storage(uris[request.param])


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write_bytes("tasks/a/data.bin", b"\x00\xff")
    storage.write_json("tasks/a/manifest.json", {"b": [1, None], "a": "é"})
    assert storage.read_bytes("tasks/a/data.bin") == b"\x00\xff"
    assert storage.read_json("tasks/a/manifest.json") == {"a": "é", "b": [1, None]}
    assert storage.read_bytes("tasks/a/manifest.json").startswith(b'{\n "a":'), "sorted, for people and for digests"
    assert storage.list("tasks/a") == ["data.bin", "manifest.json"]
    assert storage.list("tasks") == ["a"]
    assert storage.exists("tasks/a/data.bin")
    assert storage.exists("tasks/a")
    storage.write_bytes("tasks/a/data.bin", b"")
    assert storage.read_bytes("tasks/a/data.bin") == b""
    assert storage.list("tasks/a") == ["data.bin", "manifest.json"]


def test_json_without_end_is_an_error(storage: Storage) -> None:
    for data in (b"[" * 100_000, b"{", b"\xff"):
        storage.write_bytes("a.json", data)
        with pytest.raises(ValueError, match=r"nested too deeply|Expecting|decode"):
            storage.read_json("a.json")


def test_json_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """As by a store under load, which gave a shorter object with the length of the one before it."""
    torn = [True, True]

    class Store(Storage):
        def read_bytes(self, path: str) -> bytes:
            return super().read_bytes(path) + b"\0" * bool(torn and torn.pop())

    storage = Store(str(tmp_path))
    storage.write_json("a.json", {"holds": True})
    assert storage.read_json("a.json") == {"holds": True}
    assert not torn


def test_what_is_not_there(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("")
    assert not storage.exists("no/such.json")
    assert storage.list("no/such") == storage.list("") == []
    storage.delete("no/such")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("no/such.json")
    with pytest.raises(FileNotFoundError):
        storage.read_json("no/such.json")
    with pytest.raises(FileNotFoundError):
        storage.download("no/such", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "missing", "sent")
    assert not storage.exists("sent")


def test_deleting(storage: Storage) -> None:
    for path in ("a/1", "a/b/2", "c/3"):
        storage.write_bytes(path, b"x")
    storage.delete("a/b/2")
    assert storage.list("a/b") == []
    storage.delete("a")
    assert not storage.exists("a/1")
    assert storage.list("") == ["c"]


def test_trees_are_copied_both_ways(storage: Storage, tmp_path: Path) -> None:
    tree = {"one": b"1", "sub/two": b"2", "sub/deeper/three": b""}
    for name, data in tree.items():
        path = tmp_path / "sent" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    storage.upload(tmp_path / "sent", "trees/first")
    assert {name: storage.read_bytes(f"trees/first/{name}") for name in tree} == tree
    storage.download("trees/first", tmp_path / "got")
    assert {name: (tmp_path / "got" / name).read_bytes() for name in tree} == tree
    assert sum(path.is_file() for path in (tmp_path / "got").rglob("*")) == len(tree)


def test_files_are_copied_both_ways(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sent.bin").write_bytes(b"bytes")
    storage.upload("sent.bin", "files/model.bin")
    storage.upload(tmp_path / "sent.bin", "model.bin")
    assert storage.read_bytes("files/model.bin") == storage.read_bytes("model.bin") == b"bytes"
    storage.download("files/model.bin", tmp_path / "new folder" / "model.bin")
    storage.download("files/model.bin", "model.bin")
    assert (tmp_path / "new folder" / "model.bin").read_bytes() == Path("model.bin").read_bytes() == b"bytes"


def test_a_folder_is_the_same_wherever_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = Storage("./runs")
    assert storage.is_local
    assert storage.uri == storage.absolute("") == f"{tmp_path}/runs"
    assert storage.absolute("a/b") == storage.fs_path("a/b") == f"{tmp_path}/runs/a/b"
    assert Storage("~/runs").uri == Storage(f"file://{tmp_path}/runs/").uri == storage.uri
    storage.write_bytes("a", b"1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_a_uri_keeps_its_options() -> None:
    storage = Storage("s3://bucket/runs/?region=eu-west-1&endpoint_override=127.0.0.1:9")
    assert not storage.is_local
    assert storage.fs_path("a/b") == "bucket/runs/a/b"
    assert storage.absolute("a/b") == "s3://bucket/runs/a/b?region=eu-west-1&endpoint_override=127.0.0.1:9"
    assert Storage("s3://bucket/runs?region=eu-west-1").absolute("a") == "s3://bucket/runs/a?region=eu-west-1"
    copy = pickle.loads(pickle.dumps(storage))
    assert (copy.uri, copy.root, copy.filesystem) == (storage.uri, storage.root, storage.filesystem)


@pytest.mark.parametrize("uri", ["", "  "])
def test_an_empty_path_is_not_the_folder_of_the_command(uri: str) -> None:
    with pytest.raises(ValueError, match=r"input = '.*': give a folder or a URI"):
        open_storage(uri, "input")


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(ValueError, match=r"storage = 'nope://host/runs': .* give a folder or a URI"):
        Storage("nope://host/runs")


def test_a_file_is_old_or_new_when_its_writer_is_killed(tmp_path: Path) -> None:
    size = 2**24
    code = f"""if True:
        import sys
        from pipeline.storage import Storage
        storage = Storage(sys.argv[1])
        storage.write_bytes("a/file", b"0" * {size})
        print("ready", flush=True)
        while True:
            for digit in b"0123456789":
                storage.write_bytes("a/file", bytes([digit]) * {size})
    """
    for milliseconds in (3, 10, 17, 29):
        command = [sys.executable, "-c", code, str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(milliseconds / 1000)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = Storage(str(tmp_path)).read_bytes("a/file")
        assert (len(content), len(set(content))) == (size, 1)


def test_parts_are_joined_to_a_path() -> None:
    assert Storage.join("tasks/", "/train", "", "key") == "tasks/train/key"


def test_a_store_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.contact.CONTACT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        uri = f"s3://bucket/runs?endpoint_override={host}&scheme=http&region=a"
        start = time.monotonic()
        with pytest.raises(
            ValueError, match=r"data.path = 's3://bucket.* has not answered within 2 s: check that this"
        ):
            open_storage(uri, "data.path")
        assert time.monotonic() - start < 10


def test_the_time_that_python_takes_to_start_is_not_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.contact.CONTACT_SECONDS", 2.0)
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(3)")  # as an import from a slow folder
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert check_store(tmp_path.as_uri(), "storage") is None


def test_a_storage_that_answers_is_opened(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path / "not there yet")).root == str(tmp_path / "not there yet")
    with pytest.raises(ValueError, match=r"storage = 'nope://bucket': .*give a folder or a URI that pyarrow.fs takes"):
        open_storage("nope://bucket")


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("file://localhost/x", "is no URI of a folder: give the path, or file:///PATH"),
        ("~nobody-here/x", "is in the home of a user whom this host does not know: give a path"),
        ("file:/x", "is no URI of a folder: give the path, or file:///PATH"),
        ("file:///x/a%20b", "has %, which other programs read as parts of a URI: give the path, without file://"),
        ("file:///x/a?b#c", "has # and ?, which other programs read as parts of a URI: give the path, without file://"),
    ],
)
def test_a_uri_of_a_folder_that_may_mean_another_one_is_refused(uri: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(f'output = {uri!r} {problem}')}$"):
        open_storage(uri, "output")


def test_a_path_may_have_what_is_refused_in_a_uri(tmp_path: Path) -> None:
    place = f"{tmp_path}/a%20b?c#d"
    open_storage(place, "output").write_bytes("a", b"1")
    assert (Path(place) / "a").read_bytes() == b"1"
