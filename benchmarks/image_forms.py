"""Writes the images of a CIFAR-100 archive in the forms in which people keep images, each as a lossless PNG."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.rows import RawDataset, Rows

FILE_ROWS = 10_000
"""Images of a Parquet file or a tar."""
GROUP_ROWS = 1000
"""Images of a row group of Parquet."""


@dataclass(frozen=True)
class EncodedSplit:
    """The images of a split as PNG files."""

    name: str
    """`train` or `test`."""
    class_names: list[str]
    """Name of the class of each image."""
    keys: list[str]
    """Name of each image without suffix: its position in the archive."""
    files: list[bytes]
    labels: np.ndarray
    """int32 (N,)."""
    coarse_labels: np.ndarray
    """int32 (N,)."""


def encode(raw: RawDataset, order: str) -> list[EncodedSplit]:
    """The splits with their images encoded.

    Args:
        raw: Decoded archive, with coarse labels.
        order: `archive`, or `classes`: the order in which folders of classes are listed.
    """
    return [
        _encode_split(name, rows, raw.label_names, order) for name, rows in (("train", raw.train), ("test", raw.test))
    ]


def _encode_split(name: str, rows: Rows, label_names: list[str], order: str) -> EncodedSplit:
    if order == "classes":
        names = np.array(label_names)[rows.labels]
        rows = rows.take(np.argsort(names, kind="stable"))
    assert rows.coarse_labels is not None
    return EncodedSplit(
        name,
        [label_names[label] for label in rows.labels.tolist()],
        [f"{row_id:05d}" for row_id in rows.row_ids.tolist()],
        [_png(image) for image in rows.images],
        rows.labels,
        rows.coarse_labels,
    )


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def write_folders(splits: list[EncodedSplit], raw: RawDataset, root: Path) -> None:
    """`train/apple/00042.png`. They are listed in the order `classes`, whatever the order of `splits`."""
    for split in splits:
        for name in sorted(set(split.class_names)):
            (root / split.name / name).mkdir(parents=True)
        for name, key, data in zip(split.class_names, split.keys, split.files, strict=True):
            (root / split.name / name / f"{key}.png").write_bytes(data)


def write_metadata(splits: list[EncodedSplit], raw: RawDataset, root: Path) -> None:
    """The folders of `write_folders` and a `metadata.csv` above them, which decides the order."""
    write_folders(splits, raw, root)
    names = raw.coarse_label_names
    assert names is not None
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "label", "coarse_label", "split"))
        for split in splits:
            for name, key, coarse in zip(split.class_names, split.keys, split.coarse_labels.tolist(), strict=True):
                table.writerow((f"{split.name}/{name}/{key}.png", name, names[coarse], split.name))


def write_parquet(splits: list[EncodedSplit], raw: RawDataset, root: Path) -> None:
    """As Hugging Face writes it: `train-00000-of-00005.parquet`, with names of the classes in the schema."""
    root.mkdir(parents=True)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": raw.label_names, "_type": "ClassLabel"},
        "coarse_label": {"names": raw.coarse_label_names, "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in splits:
        table = pa.table(
            {
                "image": pa.StructArray.from_arrays(
                    [pa.array(split.files, pa.binary()), pa.array([f"{key}.png" for key in split.keys])],
                    ["bytes", "path"],
                ),
                "label": split.labels.astype(np.int64),
                "coarse_label": split.coarse_labels.astype(np.int64),
            }
        ).replace_schema_metadata(metadata)
        starts = range(0, len(table), FILE_ROWS)
        for number, start in enumerate(starts):
            path = root / f"{split.name}-{number:05d}-of-{len(starts):05d}.parquet"
            pq.write_table(table.slice(start, FILE_ROWS), path, row_group_size=GROUP_ROWS)


def write_tars(splits: list[EncodedSplit], raw: RawDataset, root: Path) -> None:
    """WebDataset: `train-00000.tar` with `00042.png` and its class in `00042.cls`."""
    root.mkdir(parents=True)
    for split in splits:
        for number, start in enumerate(range(0, len(split.files), FILE_ROWS)):
            with tarfile.open(root / f"{split.name}-{number:05d}.tar", "w") as tar:
                for row in range(start, min(start + FILE_ROWS, len(split.files))):
                    for suffix, data in (("png", split.files[row]), ("cls", split.class_names[row].encode())):
                        member = tarfile.TarInfo(f"{split.keys[row]}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


FORMS: dict[str, Callable[[list[EncodedSplit], RawDataset, Path], None]] = {
    "folders": write_folders,
    "metadata": write_metadata,
    "parquet": write_parquet,
    "tars": write_tars,
}
