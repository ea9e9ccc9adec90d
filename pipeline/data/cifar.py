"""CIFAR-100 and CIFAR-10 (Krizhevsky, 2009): where their archives are, and how these are decoded and verified."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.archives import read_pickles
from pipeline.data.config import DatasetConfig
from pipeline.data.download import read_archive
from pipeline.data.excerpt import excerpt
from pipeline.data.rows import RawDataset, Rows
from pipeline.data.source import Archive, Source, verify_coarse, verify_split


@dataclass(frozen=True)
class CifarArchive(Archive):
    """An archive with the names of its members and the keys of the pickled dicts in them."""

    train_members: tuple[str, ...]
    test_members: tuple[str, ...]
    meta_member: str
    label_key: bytes
    label_names_key: bytes
    coarse_label_key: bytes | None = None
    coarse_label_names_key: bytes | None = None


def _load(config: DatasetConfig, source: Source) -> RawDataset:
    assert source.archive is not None
    return decode_archive(read_archive(config, source.name, source.archive), source)


def decode_archive(data: bytes, source: Source) -> RawDataset:
    """Decodes the bytes of a CIFAR `.tar.gz` and verifies that they are what `source` promises.

    Raises:
        ValueError: if they are not, or if a pickle in it needs anything but plain NumPy arrays.
    """
    layout = source.archive
    assert isinstance(layout, CifarArchive)
    try:
        members = read_pickles(data, {*layout.train_members, *layout.test_members, layout.meta_member})
    except ValueError as error:
        raise ValueError(f"{source.name} archive: {error}") from error
    train = _split([(name, members[name]) for name in layout.train_members], source)
    test = _split([(name, members[name]) for name in layout.test_members], source)
    verify_split(train, source, source.train_rows, f"{source.name}: train")
    verify_split(test, source, source.test_rows, f"{source.name}: test")
    verify_coarse(train, test, source)

    meta = members[layout.meta_member]
    label_names = _names(meta, layout.label_names_key, source.num_classes, source)
    if layout.coarse_label_names_key is None or source.num_coarse_classes is None:
        return RawDataset(train, test, label_names)
    coarse_names = _names(meta, layout.coarse_label_names_key, source.num_coarse_classes, source)
    return RawDataset(train, test, label_names, coarse_names)


def _split(batches: list[tuple[str, dict[bytes, Any]]], source: Source) -> Rows:
    layout = source.archive
    assert isinstance(layout, CifarArchive)
    parts = [_batch_images(name, batch, source) for name, batch in batches]
    # From planes (C, H, W), as the archive has them, to (H, W, C).
    images = np.ascontiguousarray(np.concatenate(parts).transpose(0, 2, 3, 1))
    labels = np.concatenate([_batch_labels(name, batch, layout.label_key, source) for name, batch in batches])
    key = layout.coarse_label_key
    coarse = None if key is None else np.concatenate([_batch_labels(n, b, key, source) for n, b in batches])
    return Rows.of(images, labels, coarse)


def _batch_images(name: str, batch: dict[bytes, Any], source: Source) -> np.ndarray:
    height, width, channels = source.image_shape
    images = _get(batch, b"data", name, source)
    row_bytes = height * width * channels
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (row_bytes,):
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{source.name}: {name}: expected data of uint8 (N, {row_bytes}), found {found}")
    return images.reshape(-1, channels, height, width)


def _batch_labels(name: str, batch: dict[bytes, Any], key: bytes, source: Source) -> np.ndarray:
    labels = _get(batch, key, name, source)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        raise ValueError(f"{source.name}: {name}: expected {key.decode()} to be a list of integers from 0")
    return np.array(labels, np.int32)


def _names(meta: dict[bytes, Any], key: bytes, count: int, source: Source) -> list[str]:
    names = _get(meta, key, "meta", source)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, bytes) for name in names):
        raise ValueError(f"{source.name}: expected {key.decode()} to be {count} names, found {excerpt(names)}")
    return [name.decode(errors="backslashreplace") for name in names]


def _get(batch: dict[bytes, Any], key: bytes, name: str, source: Source) -> Any:
    if key not in batch:
        raise ValueError(f"{source.name}: {name}: expected the key {key!r}, found {excerpt(list(batch))}")
    return batch[key]


_TERMS = "Its authors name no licence; it is meant for research."
CIFAR100 = Source(
    name="cifar100",
    description=f"CIFAR-100 (Krizhevsky, 2009): 60,000 photographs of 32 x 32, 100 classes. {_TERMS}",
    load=_load,
    image_shape=(32, 32, 3),
    num_classes=100,
    num_coarse_classes=20,
    flips=True,
    train_rows=50_000,
    test_rows=10_000,
    archive=CifarArchive(
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
)
CIFAR10 = Source(
    name="cifar10",
    description=f"CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of 32 x 32, 10 classes. {_TERMS}",
    load=_load,
    image_shape=(32, 32, 3),
    num_classes=10,
    num_coarse_classes=None,
    flips=True,
    train_rows=50_000,
    test_rows=10_000,
    archive=CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        train_members=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_members=("test_batch",),
        meta_member="batches.meta",
        label_key=b"labels",
        label_names_key=b"label_names",
    ),
)
