"""Thousands of damaged files end in results or in errors of ours: no crash, no hang, no traceback, little memory.

Each is mutated from a good one, with a fixed seed; archives are also mutated inside of their compression.
"""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_ingest import SMALL, cifar_members, python2_pickle

READER = Path(__file__).with_name("hostile_reader.py")
MIB_LIMIT = 1000
"""Memory that a reader may take beyond what its libraries have taken."""
LONGEST_MESSAGE = 5000
SECONDS_LIMIT = 20.0
"""Of one file."""

pytestmark = pytest.mark.slow
Maker = Callable[[np.random.Generator], bytes]


def image(rng: np.random.Generator, kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def parquet(rng: np.random.Generator) -> bytes:
    images = [image(rng, "PNG") for _ in range(6)]
    columns: dict[str, Any] = {"label": [f"class {number % 2}" for number in range(6)], "row_id": range(6)}
    match rng.integers(3):
        case 0:
            columns["image"] = images
        case 1:
            columns["image"] = [{"bytes": data, "path": "x"} for data in images]
        case _:
            columns["image"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((6, 8, 6, 3), np.uint8))
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression=str(rng.choice(["none", "zstd", "snappy"])), row_group_size=4)
    return sink.getvalue()


def npz(rng: np.random.Generator) -> bytes:
    data = io.BytesIO()
    save = np.savez if rng.random() < 0.7 else np.savez_compressed
    labels = np.array(["a", "b"] * 3) if rng.random() < 0.5 else np.arange(6) % 2
    save(data, images=rng.integers(0, 256, (6, 8, 6, 3), dtype=np.uint8), labels=labels, row_ids=np.arange(6))
    return data.getvalue()


def tar(rng: np.random.Generator) -> bytes:
    data = io.BytesIO()
    kind = tarfile.PAX_FORMAT if rng.random() < 0.5 else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=data, mode="w", format=kind) as archive:
        for number in range(6):
            name = "long/" * int(rng.integers(40)) + str(number)
            for suffix, content in (("png", image(rng, "PNG")), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def picture(rng: np.random.Generator) -> bytes:
    return image(rng, str(rng.choice(["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])))


def archive(rng: np.random.Generator) -> bytes:
    """A tar, not compressed yet, whose pickles are mutated half of the time."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as made:
        for name, content in cifar_members(SMALL["cifar100"]).items():
            pickled = python2_pickle(content)
            if rng.random() < 0.5:
                pickled = mutated(pickled, rng)
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            made.addfile(member, io.BytesIO(pickled))
    return data.getvalue()


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        # Headers are at both ends.
        near = int(rng.integers(len(out))) if rng.random() < 0.5 else min(int(rng.exponential(200)), len(out) - 1)
        start = near if rng.random() < 0.6 else len(out) - 1 - near
        length = int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                out[start] ^= 1 << int(rng.integers(8))
            case 1:
                out[start : start + length] = rng.bytes(length)
            case 2:
                out[start : start + length] = rng.choice([b"\xff", b"\x00", b"\x7f", b"9"]) * length
            case 3:
                del out[start + 16 : start + 16 + length]
            case 4:
                out[start:start] = out[near : near + 64]
            case _:
                del out[max(start, 16) :]
    return bytes(out)


def is_damaged(result: dict[str, Any]) -> bool:
    return result["outcome"] == "refused" or bool(re.search(r"rows, [1-9]\d* without an image", result["message"]))


def check(folder: Path, files: list[Path], *options: str) -> None:
    """Feeds the files to a reader, and checks what came of each."""
    began, environment = time.monotonic(), os.environ | {"PYTHONPATH": str(READER.parents[2])}
    reader = subprocess.run(
        [sys.executable, READER, str(MIB_LIMIT), *options],
        input="".join(f"{path}\n" for path in files),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=600,
    )
    results = [json.loads(line) for line in reader.stdout.splitlines() if line.startswith("{")]
    last = f"{len(results)} of {len(files)}, then {files[min(len(results), len(files) - 1)]}"
    assert reader.returncode == 0, f"{last}: exit code {reader.returncode}\n{reader.stderr[-3000:]}"
    assert [result["path"] for result in results] == list(map(str, files))
    for result in results:
        assert len(result["message"]) < LONGEST_MESSAGE, result["path"]
        assert result["s"] < SECONDS_LIMIT, result
    refused = sum(result["outcome"] == "refused" for result in results)
    highest = max(result["mib"] for result in results)
    print(
        f"{folder.name}: {len(files)} files, {refused} refused, {time.monotonic() - began:.0f} s, slowest "
        f"{max(result['s'] for result in results):.2f} s, highest memory {highest} MiB"
    )
    assert highest <= MIB_LIMIT
    assert 0 < sum(map(is_damaged, results)) < len(files), "the mutations are too weak, or too strong"


@pytest.mark.parametrize(
    ("make", "suffix", "count"),
    [
        (parquet, ".parquet", 1500),
        (npz, ".npz", 1500),
        (tar, ".tar", 1500),
        (picture, ".png", 1500),
        (archive, ".tar.gz", 300),
    ],
)
def test_damaged_files(make: Maker, suffix: str, count: int, tmp_path: Path) -> None:
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        data = mutated(make(rng), rng)
        if suffix == ".tar.gz":
            data = gzip.compress(data, 1)
            data = mutated(data, rng) if rng.random() < 0.2 else data
        # Each in a folder of a class, for training on image files needs one.
        path = tmp_path / f"{number:04d}" / f"x{suffix}"
        path.parent.mkdir()
        path.write_bytes(data)
        files.append(path)
    check(tmp_path, files)


def test_damaged_weights(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv[1:] = []\n"
        f"sys.path.insert(0, {str(READER.parent)!r})\n"
        "import hostile_reader; hostile_reader.small_perceiver().save('good.keras')"
    )
    environment = os.environ | {"PYTHONPATH": str(READER.parents[2])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=600)
    good, rng, files = (tmp_path / "good.keras").read_bytes(), np.random.default_rng(0), []
    for number in range(100):
        files.append(tmp_path / f"{number:04d}.keras")
        files[-1].write_bytes(mutated(good, rng))
    check(tmp_path, files, "--keras")
