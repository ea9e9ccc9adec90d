"""CIFAR-100 as image files: every form in which they may lie trains exactly as the archive does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.rows import Rows, rows_digest
from pipeline.data.shards import read_rows
from pipeline.storage import Storage

# Five runs of two epochs over 50,000 images.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[1]
# A third of the preset's cost. The mirroring of the preset has to be asked for with `files`.
SMALLER = (
    "cifar100", "--train.epochs", "2", "--train.random-flip", "--model.conv-channels", "32", "--model.data-dim", "64",
    "--model.latent-dim", "96", "--evaluation.corruption-rows", "0",
)  # fmt: skip


def run(storage: Path, *source: str) -> tuple[dict[str, str], list[dict[str, float]], dict[str, Any]]:
    """Runs the pipeline; returns the digests of the splits, the metrics of the epochs and the output of `register`."""
    command = [sys.executable, str(ROOT / "pipeline" / "run.py"), *SMALLER, *source, "--storage", str(storage)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = {}
    for task in ("ingest", "preprocess", "train", "register"):
        (path,) = (storage / "tasks" / task).glob("*/manifest.json")
        found = json.loads(path.read_text())
        outputs[task] = found["output"]
        print(f"{storage.name:8} {task:10} {found['seconds']:6.1f} s")
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    history = [{name: epoch[name] for name in names} for epoch in outputs["train"]["history"]]
    print(f"{storage.name:8} {history}")
    return digests(outputs["preprocess"], Storage(str(storage))), history, outputs["register"]


def digests(manifest: dict[str, Any], storage: Storage) -> dict[str, str]:
    """The digest of each split without the coarse labels, which folders and tars cannot say."""
    found = {}
    for split, description in manifest["splits"].items():
        parts = [read_rows(entry, storage) for entry in description["shards"]]
        order = np.argsort(row_ids := np.concatenate([part.row_ids for part in parts]))
        images = np.concatenate([part.images for part in parts])
        labels = np.concatenate([part.labels for part in parts])
        found[split] = rows_digest(Rows(row_ids[order], images[order], labels[order]))
    return found


def test_png_folders_parquet_and_tars_train_as_the_archive(cifar100_archive: tuple[Path, str], tmp_path: Path) -> None:
    archive, sha256 = cifar100_archive
    write = [sys.executable, str(ROOT / "benchmarks" / "image_sources.py"), "--archive", str(archive), "--write"]
    subprocess.run([*write, tmp_path / "as-archive", "--forms", "parquet", "tars"], check=True)
    # Folders are listed by class, so their row ids differ. The same rows in Parquet are what they are compared with.
    subprocess.run([*write, tmp_path / "by-class", "--forms", "folders", "parquet", "--order", "classes"], check=True)

    def files(path: str) -> tuple[str, ...]:
        return ("--data.source", "files", "--data.path", str(tmp_path / path))

    found = {
        "archive": run(tmp_path / "archive", "--data.archive", str(archive), "--data.sha256", sha256),
        "parquet": run(tmp_path / "parquet", *files("as-archive/parquet")),
        "tars": run(tmp_path / "tars", *files("as-archive/tars")),
        "sorted": run(tmp_path / "sorted", *files("by-class/parquet")),
        "folders": run(tmp_path / "folders", *files("by-class/folders")),
    }
    for form, like in (("parquet", "archive"), ("tars", "archive"), ("folders", "sorted")):
        assert found[form][0] == found[like][0], form
        for epoch, expected in zip(found[form][1], found[like][1], strict=True):
            assert epoch == pytest.approx(expected, abs=1e-6), form
    assert found["archive"][1][-1]["val_accuracy"] > 0.1, "it has learnt"
    assert {registered["version"] for *_, registered in found.values()} == {"1"}
