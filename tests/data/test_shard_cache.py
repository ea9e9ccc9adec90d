"""The cache of shards on a host's disk: hits, altered files, limits, full disks and processes that share it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamed_shards import write_shards

from pipeline.data.rows import Rows
from pipeline.data.shard_cache import CacheError, ShardCache
from pipeline.data.shard_reader import ShardReader
from pipeline.storage import Storage

SHAPE = (16, 16, 3)
COUNTS = [50, 50, 50]
PART = f"{'0' * 64}.shard.{'1' * 32}.tmp"
Made = tuple[Storage, Rows, list[dict[str, Any]]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    storage = Storage(str(tmp_path / "storage"))
    return storage, *write_shards(storage, COUNTS, SHAPE)


def cache_of(folder: Path, shards: list[dict[str, Any]], limit: float = 1e9) -> ShardCache:
    return ShardCache(folder, limit, frozenset(shard["sha256"] for shard in shards))


def files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir())


def test_a_shard_is_read_from_storage_once_and_by_all_processes(made: Made, tmp_path: Path) -> None:
    storage, rows, shards = made
    reader = ShardReader(storage, cache_of(tmp_path / "cache", shards))
    for _ in range(2):
        for number, shard in enumerate(shards):
            np.testing.assert_array_equal(reader.read(shard).images, rows.images[50 * number : 50 * number + 50])
    assert files(tmp_path / "cache") == sorted(shard["sha256"] for shard in shards)
    storage.delete("train")
    reader.read(shards[0])
    another = ShardReader(storage, cache_of(tmp_path / "cache", shards))  # as another process has it
    np.testing.assert_array_equal(another.read(shards[2]).images, rows.images[100:])


def test_an_altered_file_is_replaced(made: Made, tmp_path: Path) -> None:
    storage, rows, shards = made
    ShardReader(storage, cache_of(tmp_path / "cache", shards)).read(shards[0])
    (path,) = (tmp_path / "cache").iterdir()
    data = path.read_bytes()
    for wrong in (data[:-1], data[:99] + bytes([data[99] ^ 1]) + data[100:], b""):
        path.write_bytes(wrong)
        reader = ShardReader(storage, cache_of(tmp_path / "cache", shards))
        np.testing.assert_array_equal(reader.read(shards[0]).images, rows.images[:50])
        assert path.read_bytes() == data


def test_no_more_is_kept_than_the_limit_and_shards_of_other_data_make_room(made: Made, tmp_path: Path) -> None:
    storage, _, shards = made
    size = len(storage.read_bytes(shards[0]["path"]))
    folder = tmp_path / "cache"
    other = ShardReader(storage, cache_of(folder, shards[:1], limit=2.5 * size))
    other.read(shards[0])
    (folder / PART).write_bytes(bytes(size))  # of a process that was killed
    os.utime(folder / PART, (0, 0))
    reader = ShardReader(storage, cache_of(folder, shards[1:], limit=1.5 * size))
    for shard in (shards[1], shards[2], shards[1], shards[2]):
        reader.read(shard)
    assert files(folder) == [shards[1]["sha256"]]


def test_a_part_that_another_process_writes_is_left_alone(made: Made, tmp_path: Path) -> None:
    storage, _, shards = made
    (tmp_path / "cache").mkdir()
    part = tmp_path / "cache" / PART
    part.write_bytes(bytes(1000))
    ShardReader(storage, cache_of(tmp_path / "cache", shards, limit=900)).read(shards[0])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [part.name]


def test_files_of_others_in_the_folder_neither_count_nor_go(made: Made, tmp_path: Path) -> None:
    storage, rows, shards = made
    folder = tmp_path / "cache"
    (folder / "results").mkdir(parents=True)
    theirs = [folder / "results" / "a.csv", folder / "thesis.docx", folder / "0000.shard", folder / f"{'0' * 64}.h5"]
    for file in theirs:
        file.write_bytes(bytes(100_000))
    reader = ShardReader(storage, cache_of(folder, shards, limit=90_000))
    for number, shard in enumerate(shards):
        np.testing.assert_array_equal(reader.read(shard).images, rows.images[50 * number : 50 * number + 50])
    assert all(file.stat().st_size == 100_000 for file in theirs)
    assert len(list(folder.iterdir())) > 4, "no shard was kept"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_cache_of_another_user(made: Made, tmp_path: Path) -> None:
    """Their shards are read. What this user may not delete stays, and what they may not write is said."""
    storage, _, shards = made
    data = [storage.read_bytes(shard["path"]) for shard in shards]
    folder = tmp_path / "cache"
    cache_of(folder, shards).put(shards[0], data[0])
    (folder / f"{shards[1]['sha256']}.shard").write_bytes(b"damaged")
    for parent in (folder, *folder.parents):
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)

    def theirs(number: int, limit: float = 1e9) -> str:
        cache = cache_of(folder, shards[1:], limit)
        try:
            cache.put(shards[number], data[number])
        except CacheError as error:
            return str(error)
        return "kept" if cache.get(shards[number]) else "not kept"

    assert as_nobody(lambda: str(cache_of(folder, shards).get(shards[0]) == data[0])) == "True"
    assert as_nobody(lambda: str(cache_of(folder, shards).get(shards[1]))) == "None"
    assert "Permission denied" in (said := as_nobody(lambda: theirs(2)))
    assert said.endswith("give a folder that this user can write, such as one of their own")
    folder.chmod(0o1777)  # as /tmp
    assert as_nobody(lambda: theirs(2, limit=1.2 * len(data[0]))) == "not kept"
    assert len(files(folder)) == 2


def as_nobody(call: Callable[[], str]) -> str:
    """What `call` returns in a copy of this process that has another user."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writing, call().encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    rows, shards = write_shards(storage, [900, 900, 900, 900], SHAPE)  # 0.7 MB each, on a disk of 2 MiB
    reader = ShardReader(storage, cache_of(small_disk / "cache", shards))
    reader.read(shards[0])
    reader.read(shards[1])
    with pytest.raises(CacheError, match=r"train\.cache = .*/cache cannot take .*: .*No space left.*cache_gb = 1,"):
        reader.read(shards[2])
    assert len(files(small_disk / "cache")) == 2, "whole ones"
    again = ShardReader(storage, cache_of(small_disk / "cache", shards, limit=1.5e6))  # the remedy
    np.testing.assert_array_equal(np.concatenate([again.read(shard).images for shard in shards]), rows.images)


def test_a_folder_that_cannot_be_made_is_named(made: Made, tmp_path: Path) -> None:
    storage, _, shards = made
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CacheError, match=r"train\.cache = .*/file/cache cannot take a shard"):
        ShardReader(storage, cache_of(tmp_path / "file" / "cache", shards)).read(shards[0])
