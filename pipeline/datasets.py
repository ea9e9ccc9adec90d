"""The image data sets that the pipeline knows: where they are, what they promise, and how they are read and verified.

An archive's SHA-256 is checked over the very bytes that are decoded.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.archives import read_pickles

if TYPE_CHECKING:
    from pipeline.config import DatasetConfig


@dataclass(frozen=True)
class ArchiveInfo:
    """Where an official CIFAR archive is, and what lies where in it."""

    url: str
    sha256: str
    train_members: tuple[str, ...]
    test_members: tuple[str, ...]
    meta_member: str
    label_key: bytes
    label_names_key: bytes
    coarse_label_key: bytes | None = None
    coarse_label_names_key: bytes | None = None


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a data set before it is read; `load` verifies it."""

    name: str
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    num_coarse_classes: int | None
    """None if the classes have no coarser grouping."""
    flips: bool
    """Whether the mirror image of a row still shows its class: not so for digits."""
    train_rows: int
    """Rows of the training set; of the whole if `test_rows` is 0. An archive has equally many of every class."""
    test_rows: int
    """Rows of the test set; 0 if the source has none, so that `DatasetConfig.test_fraction` makes one."""
    archive: ArchiveInfo | None = None
    """None if the data come with a dependency."""


SOURCES: Mapping[str, SourceInfo] = {
    "cifar100": SourceInfo(
        name="cifar100",
        image_shape=(32, 32, 3),
        num_classes=100,
        num_coarse_classes=20,
        flips=True,
        train_rows=50_000,
        test_rows=10_000,
        archive=ArchiveInfo(
            url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            train_members=("train",),
            test_members=("test",),
            meta_member="meta",
            label_key=b"fine_labels",
            label_names_key=b"fine_label_names",
            coarse_label_key=b"coarse_labels",
            coarse_label_names_key=b"coarse_label_names",
        ),
    ),
    "cifar10": SourceInfo(
        name="cifar10",
        image_shape=(32, 32, 3),
        num_classes=10,
        num_coarse_classes=None,
        flips=True,
        train_rows=50_000,
        test_rows=10_000,
        archive=ArchiveInfo(
            url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            train_members=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test_members=("test_batch",),
            meta_member="batches.meta",
            label_key=b"labels",
            label_names_key=b"label_names",
        ),
    ),
    "digits": SourceInfo(
        name="digits",
        image_shape=(8, 8, 1),
        num_classes=10,
        num_coarse_classes=None,
        flips=False,
        train_rows=1797,
        test_rows=0,
    ),
}


@dataclass(frozen=True)
class ImageSplit:
    images: np.ndarray
    """uint8 (N, H, W, C)."""
    labels: np.ndarray
    """int32 (N,)."""
    coarse_labels: np.ndarray | None = None
    """int32 (N,), or None if the source has none."""


@dataclass(frozen=True)
class RawDataset:
    train: ImageSplit
    test: ImageSplit
    label_names: list[str]
    coarse_label_names: list[str] | None = None


def check_archive(config: DatasetConfig) -> None:
    """Checks that the archive which the user names is there and has the checksum which the user gives.

    Raises:
        ValueError: if it is not so; the message names the option and the remedy.
    """
    source = SOURCES[config.source]
    if source.archive is None:
        if config.archive is not None or config.sha256 is not None:
            option, value = ("archive", config.archive) if config.archive is not None else ("sha256", config.sha256)
            raise ValueError(f"data.{option} = {value!r}: the source {source.name!r} has no archive; leave it out")
        return
    if config.archive is None:
        if config.sha256 is not None:
            raise ValueError(
                f"data.sha256 = {config.sha256!r}: the checksum of the official archive is known; "
                "leave it out, or give --data.archive PATH too"
            )
        return
    path = os.path.expanduser(config.archive)
    if not os.path.isfile(path):
        raise ValueError(
            f"data.archive = {config.archive!r}: no such file; give the path of a {source.name} .tar.gz, "
            "or leave it out to download the official archive"
        )
    remedy = f"`sha256sum {shlex.quote(path)}` prints the file's checksum"
    if config.sha256 is None:
        raise ValueError(f"data.sha256 = None: a local archive is read only with its checksum; {remedy}")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", config.sha256):
        raise ValueError(f"data.sha256 = {config.sha256!r}: must be 64 hexadecimal digits; {remedy}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _check_sha256(config, found)


def load(config: DatasetConfig) -> RawDataset:
    """Reads, decodes and verifies a whole data set into memory.

    Raises:
        ValueError: as `check_archive`, or if the data are not what the source promises; the message names expected and
            found.
        ConnectionError: if the official archive cannot be downloaded.
    """
    source = SOURCES[config.source]
    check_archive(config)
    if source.archive is None:
        return _load_digits(config, source)
    path = os.path.expanduser(config.archive) if config.archive is not None else _download(source)
    with open(path, "rb") as file:
        data = file.read()
    # Once more, for the file may have changed since; `get_file` checks a download only as it was on the disk.
    found = hashlib.sha256(data).hexdigest()
    if config.archive is not None:
        _check_sha256(config, found)
    elif found != source.archive.sha256:
        raise ValueError(f"{path}: expected SHA-256 {source.archive.sha256}, found {found}; delete it and run again")
    return decode_archive(data, source)


def _check_sha256(config: DatasetConfig, found: str) -> None:
    if config.sha256 is None or found != config.sha256.lower():
        raise ValueError(
            f"data.sha256 = {config.sha256!r}: {config.archive} has the SHA-256 {found}; "
            "fetch the file again, or give this checksum if the file is the one that you mean"
        )


def _download(source: SourceInfo) -> str:
    import keras

    assert source.archive is not None
    name = source.archive.url.rpartition("/")[2]
    try:
        return keras.utils.get_file(name, origin=source.archive.url, file_hash=source.archive.sha256)
    except Exception as error:  # `get_file` raises a bare Exception for whatever went wrong.
        raise ConnectionError(
            f"data.source = {source.name!r}: {error}; or fetch {source.archive.url} by other means and give "
            f"--data.archive PATH --data.sha256 {source.archive.sha256}"
        ) from error


def _load_digits(config: DatasetConfig, source: SourceInfo) -> RawDataset:
    """scikit-learn's 1,797 digits of 8 x 8 grey levels from 0 to 16, scaled to the whole of uint8."""
    import sklearn.datasets
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    splits = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=config.test_fraction, stratify=labels, random_state=config.seed
    )
    train, test = (ImageSplit(images[np.sort(rows)], labels[np.sort(rows)]) for rows in splits)
    _verify(train, source, None, "digits: train")
    _verify(test, source, None, "digits: test")
    return RawDataset(train, test, label_names=[str(name) for name in digits.target_names])


def decode_archive(data: bytes, source: SourceInfo) -> RawDataset:
    """Decodes the bytes of a CIFAR `.tar.gz` and verifies that they are what `source` promises.

    Raises:
        ValueError: if they are not; or if a pickle in it asks for anything but plain numpy arrays.
    """
    layout = source.archive
    assert layout is not None
    try:
        members = read_pickles(data, {*layout.train_members, *layout.test_members, layout.meta_member})
    except ValueError as error:
        raise ValueError(f"{source.name} archive: {error}") from error
    train = _split([(name, members[name]) for name in layout.train_members], source)
    test = _split([(name, members[name]) for name in layout.test_members], source)
    _verify(train, source, source.train_rows, f"{source.name}: train")
    _verify(test, source, source.test_rows, f"{source.name}: test")
    _verify_coarse(train, test, source)

    meta = members[layout.meta_member]
    label_names = _names(meta, layout.label_names_key, source.num_classes, source)
    if layout.coarse_label_names_key is None or source.num_coarse_classes is None:
        return RawDataset(train, test, label_names)
    coarse_names = _names(meta, layout.coarse_label_names_key, source.num_coarse_classes, source)
    return RawDataset(train, test, label_names, coarse_names)


def _split(batches: list[tuple[str, dict[bytes, Any]]], source: SourceInfo) -> ImageSplit:
    layout = source.archive
    assert layout is not None
    parts = [_batch_images(name, batch, source) for name, batch in batches]
    # From planes (C, H, W), as the archive has them, to (H, W, C).
    images = np.ascontiguousarray(np.concatenate(parts).transpose(0, 2, 3, 1))
    labels = np.concatenate([_batch_labels(name, batch, layout.label_key, source) for name, batch in batches])
    key = layout.coarse_label_key
    coarse = None if key is None else np.concatenate([_batch_labels(n, b, key, source) for n, b in batches])
    return ImageSplit(images, labels, coarse)


def _batch_images(name: str, batch: dict[bytes, Any], source: SourceInfo) -> np.ndarray:
    height, width, channels = source.image_shape
    images = _get(batch, b"data", name, source)
    row_bytes = height * width * channels
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (row_bytes,):
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{source.name}: {name}: expected data of uint8 (N, {row_bytes}), found {found}")
    return images.reshape(-1, channels, height, width)


def _batch_labels(name: str, batch: dict[bytes, Any], key: bytes, source: SourceInfo) -> np.ndarray:
    labels = _get(batch, key, name, source)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        raise ValueError(f"{source.name}: {name}: expected {key.decode()} to be a list of integers from 0")
    return np.array(labels, np.int32)


def _names(meta: dict[bytes, Any], key: bytes, count: int, source: SourceInfo) -> list[str]:
    names = _get(meta, key, "meta", source)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, bytes) for name in names):
        raise ValueError(f"{source.name}: expected {key.decode()} to be {count} names, found {names!r}")
    return [name.decode() for name in names]


def _get(batch: dict[bytes, Any], key: bytes, name: str, source: SourceInfo) -> Any:
    if key not in batch:
        raise ValueError(f"{source.name}: {name}: expected the key {key!r}, found {sorted(batch, key=repr)}")
    return batch[key]


def _verify(split: ImageSplit, source: SourceInfo, rows: int | None, what: str) -> None:
    """Checks ranges and lengths; and, of a source with `rows` in equal classes, the number of every class."""
    for kind, labels, num_classes in (
        ("labels", split.labels, source.num_classes),
        ("coarse labels", split.coarse_labels, source.num_coarse_classes),
    ):
        if labels is None or num_classes is None:
            continue
        if len(labels) != len(split.images):
            raise ValueError(f"{what}: expected {len(split.images)} {kind}, one for each image, found {len(labels)}")
        if (highest := labels.max(initial=-1)) >= num_classes:
            raise ValueError(f"{what}: expected {kind} from 0 to {num_classes - 1}, found {highest}")
        if rows is None:
            continue
        counts = np.bincount(labels, minlength=num_classes)
        expected = rows // num_classes
        if (wrong := np.flatnonzero(counts != expected)).size:
            raise ValueError(
                f"{what}: expected {expected} rows of each of the {num_classes} {kind}, "
                f"found {counts[wrong[0]]} of {wrong[0]} and {wrong.size - 1} other counts that differ"
            )


def _verify_coarse(train: ImageSplit, test: ImageSplit, source: SourceInfo) -> None:
    """Every row of a class must be of one coarse class, in the training and the test set alike."""
    coarse_of = np.full(source.num_classes, -1)
    for what, split in (("train", train), ("test", test)):
        if split.coarse_labels is None:
            continue
        if what == "train":
            coarse_of[split.labels] = split.coarse_labels
        if (wrong := np.flatnonzero(coarse_of[split.labels] != split.coarse_labels)).size:
            label, found = split.labels[wrong[0]], split.coarse_labels[wrong[0]]
            raise ValueError(
                f"{source.name}: {what}: expected the coarse label {coarse_of[label]} with the label {label}, as in "
                f"other rows, found {found}"
            )
