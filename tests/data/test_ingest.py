"""`pipeline.data.cifar` and `pipeline.data.archives`: invalid archives are refused, and no code in one is executed."""

import hashlib
import io
import socket
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.cifar import CifarArchive, decode_archive
from pipeline.data.config import DatasetConfig
from pipeline.data.download import check_archive, read_archive
from pipeline.data.ingest import load
from pipeline.data.source import Archive, Source
from pipeline.data.sources import SOURCES

# The real layouts with fewer rows, so that an archive takes milliseconds to build.
SMALL = {
    "cifar100": replace(SOURCES["cifar100"], train_rows=200, test_rows=100),
    "cifar10": replace(SOURCES["cifar10"], train_rows=100, test_rows=20),
}


def python2_pickle(value: Any) -> bytes:
    """The bytes that Python 2's `cPickle.dump(value, file, 2)` writes; Python 3 cannot write its strings."""

    def encode(value: Any) -> bytes:
        match value:
            case dict():
                return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
            case list():
                return b"](" + b"".join(encode(item) for item in value) + b"e"
            case bytes():
                return b"T" + struct.pack("<i", len(value)) + value
            case int():
                return b"J" + struct.pack("<i", value)
            case np.ndarray():
                shape = b"(" + b"".join(encode(size) for size in value.shape) + b"t"
                dtype = b"cnumpy\ndtype\n(" + encode(value.dtype.str[1:].encode()) + b"J\0\0\0\0J\1\0\0\0tR"
                empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\0\0\0\0tU\1btR"
                return empty + b"(J\1\0\0\0" + shape + dtype + b"\x89" + encode(value.tobytes()) + b"tb"
        raise TypeError(type(value))

    return b"\x80\x02" + encode(value) + b"."


def cifar_members(source: Source, seed: int = 0) -> dict[str, dict[bytes, Any]]:
    """The dicts of an archive of random images in which every class has as many rows as `source` says."""
    layout, rng = source.archive, np.random.default_rng(seed)
    assert isinstance(layout, CifarArchive)
    members: dict[str, dict[bytes, Any]] = {}
    for names, rows in ((layout.train_members, source.train_rows), (layout.test_members, source.test_rows)):
        labels = np.array_split(rng.permutation(np.arange(rows) % source.num_classes), len(names))
        for name, part in zip(names, labels, strict=True):
            data = rng.integers(0, 256, (len(part), 3072), dtype=np.uint8)
            members[name] = {b"data": data, layout.label_key: part.tolist(), b"batch_label": name.encode()}
            if layout.coarse_label_key is not None:
                members[name][layout.coarse_label_key] = (part // 5).tolist()
    members[layout.meta_member] = {layout.label_names_key: [b"class %d" % i for i in range(source.num_classes)]}
    if layout.coarse_label_names_key is not None:
        members[layout.meta_member][layout.coarse_label_names_key] = [b"coarse %d" % i for i in range(20)]
    return members


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(f"cifar-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def archive_of(members: dict[str, dict[bytes, Any]]) -> bytes:
    return tar_gz({name: python2_pickle(content) for name, content in members.items()})


@pytest.mark.parametrize("name", SMALL)
def test_decodes_every_row_of_an_archive(name: str) -> None:
    source = SMALL[name]
    assert isinstance(source.archive, CifarArchive)
    members = cifar_members(source)
    raw = decode_archive(archive_of(members), source)
    for split, names in ((raw.train, source.archive.train_members), (raw.test, source.archive.test_members)):
        planes = np.concatenate([members[name][b"data"] for name in names]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([members[name][source.archive.label_key] for name in names])
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int32
        # Row i, line y, column x, channel c is byte (c, y, x) of the archive's row.
        np.testing.assert_array_equal(split.images, np.moveaxis(planes, 1, -1))
        np.testing.assert_array_equal(split.labels, labels)
        if name == "cifar100":
            np.testing.assert_array_equal(split.coarse_labels, labels // 5)
        else:
            assert split.coarse_labels is None
    assert raw.label_names[3] == "class 3"
    assert (raw.coarse_label_names or [])[:1] == (["coarse 0"] if name == "cifar100" else [])


def test_a_pickle_that_asks_for_anything_else_is_named_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    members = {name: python2_pickle(content) for name, content in cifar_members(SMALL["cifar100"]).items()}
    members["meta"] = b"\x80\x02cposix\nsystem\n(U" + bytes([len(f"touch '{marker}'")]) + f"touch '{marker}'".encode()
    members["meta"] += b"tR."
    with pytest.raises(ValueError, match=r"cifar100 archive: meta: .* asks for posix\.system"):
        decode_archive(tar_gz(members), SMALL["cifar100"])
    assert not marker.exists()


def test_a_malformed_pickle_is_a_value_error() -> None:
    members = {name: python2_pickle(content) for name, content in cifar_members(SMALL["cifar100"]).items()}
    for garbage in (members["test"][:-100], b"\x80\x02tR.", b"", b"\x80\x02K\x07."):
        with pytest.raises(ValueError, match="cifar100 archive: test: "):
            decode_archive(tar_gz(members | {"test": garbage}), SMALL["cifar100"])


@pytest.mark.parametrize("name", SMALL)
def test_a_truncated_archive_is_a_value_error(name: str) -> None:
    data = archive_of(cifar_members(SMALL[name]))
    for size in (0, 10, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ValueError, match=f"{name} archive: expected"):
            decode_archive(data[:size], SMALL[name])


def test_a_missing_member_is_named() -> None:
    members = cifar_members(SMALL["cifar10"])
    del members["data_batch_4"]
    with pytest.raises(ValueError, match=r"found none called \['data_batch_4'\]"):
        decode_archive(archive_of(members), SMALL["cifar10"])


def relabel(member: dict[bytes, Any], old: int, new: int) -> None:
    labels = member[b"fine_labels"]
    labels[labels.index(old)] = new


def drop_a_row(member: dict[bytes, Any]) -> None:
    for key in (b"data", b"fine_labels", b"coarse_labels"):
        member[key] = member[key][1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: relabel(m["train"], 7, 8), "train: expected 2 rows of each of the 100 labels, found 1 of 7"),
        (lambda m: relabel(m["train"], 7, 100), "train: expected labels from 0 to 99, found 100"),
        (lambda m: relabel(m["train"], 7, -1), "train: expected fine_labels to be a list of integers from 0"),
        (lambda m: relabel(m["train"], 7, 2**31 - 1), "train: expected labels from 0 to 99, found 2147483647"),
        (lambda m: drop_a_row(m["test"]), "test: expected 1 rows of each of the 100 labels, found 0 of"),
        (lambda m: m["train"][b"fine_labels"].pop(), "train: expected 200 labels, one for each image, found 199"),
        (lambda m: m["test"][b"coarse_labels"].reverse(), "test: expected the coarse label"),
        (lambda m: m["test"].pop(b"data"), "test: expected the key b'data', found"),
        (lambda m: m["test"].update({b"data": np.zeros((100, 3071), np.uint8)}), r"test: .* found uint8 \(100, 3071\)"),
        (
            lambda m: m["test"].update({b"data": np.zeros((100, 3072), np.int16)}),
            "test: .* of type b'i2', and not of uint8",
        ),
        (lambda m: m["test"].update({b"data": [0]}), "test: .* found list"),
        (lambda m: m["meta"][b"fine_label_names"].pop(), "expected fine_label_names to be 100 names, found"),
    ],
)
def test_every_broken_promise_is_named(change: Any, message: str) -> None:
    members = cifar_members(SMALL["cifar100"])
    change(members)
    with pytest.raises(ValueError, match=rf"^cifar100( archive)?: {message}"):
        decode_archive(archive_of(members), SMALL["cifar100"])


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "my archive.tar.gz"
    path.write_bytes(archive_of(cifar_members(SMALL["cifar10"])))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_small_archive_passes_the_check_but_not_the_counts(archive: tuple[Path, str]) -> None:
    path, sha256 = archive
    config = DatasetConfig(source="cifar10", archive=str(path), sha256=sha256.upper())
    check_archive(config, SOURCES[config.source])
    with pytest.raises(ValueError, match="cifar10: train: expected 5000 rows of each of the 10 labels, found 10 of 0"):
        load(config)


def test_messages_of_the_archive_check(archive: tuple[Path, str]) -> None:
    path, sha256 = archive
    other = "0" * 64
    for config, parts in (
        (DatasetConfig("cifar10", f"{path}x", sha256), ("data.archive = ", f"{path}x", "no such file")),
        (DatasetConfig("cifar10", str(path.parent), sha256), ("data.archive = ", "no such file")),
        (DatasetConfig("cifar10", str(path), other), (f"data.sha256 = '{other}'", f"has the SHA-256 {sha256}")),
        (DatasetConfig("cifar10", str(path)), ("data.sha256 = None", f"`sha256sum '{path}'`")),
        (DatasetConfig("cifar10", str(path), sha256[:-1]), ("data.sha256 = ", "64 hexadecimal digits")),
        (DatasetConfig("cifar10", str(path), "g" * 64), ("data.sha256 = ", "64 hexadecimal digits")),
        (DatasetConfig("cifar10", sha256=sha256), ("data.sha256 = ", "--data.archive PATH")),
        (DatasetConfig("digits", str(path), sha256), ("data.archive = ", "'digits' has no archive")),
        (DatasetConfig("digits", sha256=sha256), ("data.sha256 = ", "'digits' has no archive")),
    ):
        with pytest.raises(ValueError, match=r"^data\.(archive|sha256) = ") as caught:
            check_archive(config, SOURCES[config.source])
        assert all(part in str(caught.value) for part in parts), caught.value


def test_digits_are_split_by_class_and_seed() -> None:
    config = DatasetConfig(source="digits", test_fraction=0.2, seed=3)
    raw, again, other = load(config), load(config), load(replace(config, seed=4))
    assert len(raw.train.labels) + len(raw.test.labels) == SOURCES["digits"].train_rows
    assert raw.train.images.shape[1:] == (8, 8, 1)
    assert raw.train.images.dtype == np.uint8
    assert (raw.train.images.min(), raw.train.images.max()) == (0, 255)
    counts = np.stack([np.bincount(split.labels, minlength=10) for split in (raw.train, raw.test)])
    assert np.abs(counts[1] - 0.2 * counts.sum(0)).max() <= 1
    np.testing.assert_array_equal(raw.test.images, again.test.images)
    assert not np.array_equal(raw.test.images, other.test.images)
    everything = np.concatenate([raw.train.images, raw.test.images]).reshape(-1, 64)
    assert len(np.unique(everything, axis=0)) == len(everything) == SOURCES["digits"].train_rows


def test_the_real_archive_has_the_published_statistics(cifar100_archive: tuple[Path, str]) -> None:
    path, sha256 = cifar100_archive
    raw = load(DatasetConfig(source="cifar100", archive=str(path), sha256=sha256))
    assert raw.train.images.shape == (50_000, 32, 32, 3)
    assert raw.test.images.shape == (10_000, 32, 32, 3)
    histograms = np.stack([np.bincount(channel, minlength=256) for channel in raw.train.images.reshape(-1, 3).T])
    levels = np.arange(256) / 255
    mean = histograms @ levels / histograms.sum(1)
    std = np.sqrt(histograms @ levels**2 / histograms.sum(1) - mean**2)
    np.testing.assert_allclose(mean, [0.5070752, 0.4865489, 0.4409178], atol=1e-6)
    np.testing.assert_allclose(std, [0.2673343, 0.2564385, 0.2761505], atol=1e-6)
    assert raw.label_names[:2] == ["apple", "aquarium_fish"]
    assert raw.coarse_label_names is not None
    assert len(raw.coarse_label_names) == 20


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import pipeline.data.cifar, sys; print(sorted({'keras', 'tensorflow', 'sklearn', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_archive_that_cannot_be_downloaded_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither from a server that accepts and says nothing."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("pipeline.data.download.SILENCE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-{tmp_path.name}.tar.gz"
        with pytest.raises(ValueError, match=rf"data.source = 'cifar100': .*; or fetch {url} by other means and give"):
            read_archive(DatasetConfig(), "cifar100", Archive(url, "0" * 64))
