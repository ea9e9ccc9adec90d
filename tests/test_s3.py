"""Storage in an object store: a real S3-compatible server on this machine, SeaweedFS."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3Server

from pipeline.data import shard_reader
from pipeline.data.rows import Rows
from pipeline.data.shard_reader import ShardReader, ShardUnavailableError
from pipeline.data.shards import write_rows
from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import Storage
from pipeline.workflow.lease import Lease

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        yield server


@pytest.fixture
def storage(server: S3Server, request: pytest.FixtureRequest) -> Storage:
    """A storage with its own prefix in the bucket."""
    return Storage(server.uri.replace("?", f"/{request.node.name}?"))


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("tasks/a/manifest.json")
    assert storage.list("tasks") == []
    storage.write_json("tasks/a/manifest.json", {"b": 1})
    storage.write_bytes("tasks/a/data.bin", b"\x00\xff")
    assert storage.exists("tasks/a/manifest.json")
    assert storage.list("tasks/a") == ["data.bin", "manifest.json"]
    assert storage.read_json("tasks/a/manifest.json") == {"b": 1}
    storage.write_bytes("tasks/a/data.bin", b"")
    assert storage.read_bytes("tasks/a/data.bin") == b""
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("no/such")
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/a").write_text("a")
    (tmp_path / "tree/sub/b").write_text("b")
    storage.upload(tmp_path / "tree", "tasks/tree")
    storage.download("tasks/tree", tmp_path / "back")
    assert (tmp_path / "back/sub/b").read_text() == "b"
    storage.delete("tasks/tree")
    storage.delete("tasks/tree")
    storage.delete("no/such")
    assert not storage.exists("tasks/tree/a")
    assert not storage.exists("tasks/tree/sub/b")
    storage.delete("tasks/a/data.bin")
    assert storage.list("tasks/a") == ["manifest.json"]


def test_a_wrong_key_is_an_error_that_says_so(server: S3Server, tmp_path: Path) -> None:
    code = "import sys; from pipeline.storage import Storage; Storage(sys.argv[1]).write_bytes('a', b'')"
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    result = subprocess.run(
        [sys.executable, "-c", code, server.uri], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "OSError" in result.stderr
    assert "SIGNATURE" in result.stderr.upper() or "ACCESS_DENIED" in result.stderr.upper(), result.stderr


def test_one_driver_at_a_time(storage: Storage) -> None:
    inside, most, turns = 0, 0, 0

    def drive() -> None:
        nonlocal inside, most, turns
        with Lease(storage, ["run"], lambda key, claim: None) as held:
            inside += 1
            most = max(most, inside)
            time.sleep(0.7)
            held.check()
            turns += 1
            inside -= 1

    drivers = [threading.Thread(target=drive) for _ in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert (turns, most) == (3, 1)


@pytest.mark.slow
def test_the_whole_pipeline(storage: Storage, tmp_path: Path) -> None:
    command = [
        sys.executable, "pipeline/run.py", "quickstart", "--search.num-trials", "2", "--search.epochs", "2",
        "--train.epochs", "5", "--train.warmup-epochs", "1", "--storage", storage.uri,
        "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--summary-json", str(tmp_path / "summary.json"),
    ]  # fmt: skip
    for state in ("done", "cached"):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert {task["state"] for task in summary["tasks"].values()} == {state}
    assert summary["search"]["num_trials"] == 2
    assert summary["model"]["uri"] == "models:/perceiver/1"


@pytest.mark.long
def test_shards_are_streamed_and_a_store_that_is_gone_is_named(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    with S3Server(tmp_path / "own") as own:
        storage = Storage(own.uri.replace("?", "/streamed?"))
        parts = [Rows.of(random.integers(0, 256, (200, 32, 32, 3), np.uint8), np.arange(200)) for _ in range(8)]
        shards = [write_rows(part, storage, f"train/{number}.parquet") for number, part in enumerate(parts)]
        data = StreamedRows(ShardReader(storage), shards, (32, 32, 3), 4 * 200 * 3072)
        batches = data.global_batches(32, 0, slice(0, 32), epoch=0, step=0)
        for _ in range(60):  # more than an epoch
            rows = next(batches)[2].take(slice(0, 32))
            pixels = [
                sum((part.images[label] == image).all() for part in parts)
                for label, image in zip(rows.labels, rows.images, strict=True)
            ]
            assert pixels == [1] * 32
        own.kill()
        monkeypatch.setattr(shard_reader, "TRIES", 2)
        with pytest.raises(ShardUnavailableError, match=r"streamed/train/.\.parquet.* could not be read in 2 tries: "):
            list(batches)
