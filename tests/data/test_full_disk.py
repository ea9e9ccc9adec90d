"""A disk that is full while images are ingested: a message that names the file, and the same command goes on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.config import DatasetConfig
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_images
from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.data.rows import rows_digest
from pipeline.storage import Storage, StorageFullError

SIDE = 64


@pytest.mark.usefixtures("ray_cluster")
def test_it_is_named_and_the_same_goes_on_once_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)  # 12 KiB that no format compresses
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    config = find_images(DatasetConfig("files", path=str(tmp_path / "images")), str(tmp_path))
    storage, filler = Storage(str(small_disk)), small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    with pytest.raises(
        StorageFullError, match=r"ingested/train/00000\.parquet, \d{3},\d{3} bytes, cannot be written: No space left"
    ):
        ingest(config, storage, "ingested")
    assert not list(small_disk.rglob("*.tmp")), "what was begun takes no room"
    filler.unlink()
    ingested = ingest(config, storage, "ingested")
    filler.write_bytes(bytes(900_000))
    with pytest.raises(StorageFullError, match=r"No space left on device: make room, and give the command again"):
        preprocess(config, ingested, storage, "ready")
    filler.unlink()
    storage.delete("ready")  # as the next attempt at a task does
    manifest = preprocess(config, ingested, storage, "ready")
    assert manifest["splits"]["test"]["digest"] == rows_digest(load_files(config).test)
