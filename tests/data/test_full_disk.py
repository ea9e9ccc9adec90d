"""A disk that is full while images are ingested: a message that names the file, and the same command goes on."""

import subprocess
import sys
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

ROOT = Path(__file__).parents[2]
SIDE = 64


def write_noise(folder: Path, rows_per_class: int) -> None:
    """PNG files of two classes: 12 KiB of pixels each that no format compresses."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(rows_per_class):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.mark.usefixtures("ray_cluster")
def test_it_is_named_and_the_same_goes_on_once_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    write_noise(tmp_path / "images", rows_per_class=30)
    config = find_images(DatasetConfig("files", path=str(tmp_path / "images")), str(tmp_path))
    storage, filler = Storage(str(small_disk)), small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    with pytest.raises(
        StorageFullError, match=r"ingested/train/00000\.parquet, \d{3},\d{3} bytes, cannot be written: No space left"
    ) as full:
        ingest(config, storage, "ingested")
    assert str(full.value).endswith("give the command again"), "without Ray Data's advice on retries"
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


@pytest.mark.slow  # four runs of the command, a minute in all
@pytest.mark.parametrize("what", ["storage", "cache"])
def test_the_command_names_the_full_disk_and_goes_on(what: str, tmp_path: Path, small_disk: Path) -> None:
    """The storage is too small for the rows of `ingest`; or the cache of the workers for the shards of an epoch."""
    write_noise(tmp_path / "images", rows_per_class=300)  # 7 MB of pixels
    storage = small_disk if what == "storage" else tmp_path / "storage"
    options = ["--search.num-trials", "0", "--train.epochs", "1", "--train.shuffle-window-mb", "3"]
    cache = ["--train.cache", str(small_disk), "--train.cache-gb", "1"] if what == "cache" else []
    command = [sys.executable, str(ROOT / "pipeline" / "run.py"), "quickstart", "--data.source", "files"]
    command += ["--data.path", str(tmp_path / "images"), "--storage", str(storage), *options, *cache]
    done = subprocess.run(command, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == (2 if what == "storage" else 1), said
    assert "No space left on device" in said, said
    assert ("/tasks/ingest/" if what == "storage" else "train.cache") in said, said
    assert not [noise for noise in ("Traceback", "retried_io_errors") if noise in said], said
    subprocess.run(["mount", "-o", "remount,size=256m", str(small_disk)], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if what == "cache":
        assert done.stdout.count("done before") >= 2, "ingest and preprocess are not repeated"
        assert list(small_disk.iterdir()), "the shards are kept there"
