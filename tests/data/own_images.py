"""Writes the same small images in each way in which a person may keep them."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "newt")
PER_CLASS = {"train": 14, "val": 3, "test": 3}
SHAPE = (6, 6, 3)


def make_images(seed: int = 0) -> dict[str, list[tuple[str, str, np.ndarray]]]:
    """Class, name and pixels of each image, by split, in order of class and name."""
    rng = np.random.default_rng(seed)
    return {
        split: [
            (name, f"{split}{number:02d}", rng.integers(0, 256, SHAPE, dtype=np.uint8))
            for name in CLASSES
            for number in range(count)
        ]
        for split, count in PER_CLASS.items()
    }


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def write_folders(root: Path) -> None:
    for split, rows in make_images().items():
        for name, key, image in rows:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{key}.png").write_bytes(png(image))


def write_metadata(root: Path) -> None:
    root.mkdir()
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "label", "split"))
        for split, rows in make_images().items():
            for name, key, image in rows:
                (root / f"{name}-{key}.png").write_bytes(png(image))
                table.writerow((f"{name}-{key}.png", name, split))


def write_parquet(root: Path, row_group_size: int = 5) -> None:
    (root / "data").mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    for split, rows in make_images().items():
        table = pa.table(
            {
                "image": [{"bytes": png(image), "path": f"{key}.png"} for _, key, image in rows],
                "label": pa.array([CLASSES.index(name) for name, _, _ in rows], pa.int64()),
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        half = len(rows) // 2
        for number, part in enumerate((table[:half], table[half:])):
            path = root / "data" / f"{split}-{number:05d}-of-00002.parquet"
            pq.write_table(part, path, row_group_size=row_group_size)


def write_tars(root: Path) -> None:
    root.mkdir()
    for split, rows in make_images().items():
        with tarfile.open(root / f"{split}-000000.tar", "w") as tar:
            for name, key, image in rows:
                for suffix, data in (("png", png(image)), ("cls", name.encode())):
                    member = tarfile.TarInfo(f"{name}-{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_npz(root: Path) -> None:
    root.mkdir()
    for split, rows in make_images().items():
        images = np.stack([image for *_, image in rows])
        np.savez_compressed(root / f"{split}.npz", images=images, labels=np.array([name for name, *_ in rows]))


KINDS: dict[str, Callable[[Path], None]] = {
    "folders": write_folders,
    "metadata.csv": write_metadata,
    "parquet": write_parquet,
    "tar": write_tars,
    "npz": write_npz,
}
