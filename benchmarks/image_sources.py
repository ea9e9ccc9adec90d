"""Seconds and images/s from images of one's own to shards, for each form in which the images may lie.

    python benchmarks/image_sources.py --archive cifar-100-python.tar.gz [--forms folders parquet tars] [--record FILE]
    python benchmarks/image_sources.py --archive cifar-100-python.tar.gz --write FOLDER [--order classes]
    python benchmarks/image_sources.py --names 1000000

The first command writes all images of the archive as PNG in each form, below a temporary folder, and then measures the
listing, the reading of all headers, `ingest` and `preprocess`, on the Ray cluster that is running or on a new one on
this machine. Every form is measured `--rounds` times, the forms taking turns; the results are medians. It checks that
pixels and labels are the archive's. It takes some minutes.

The second only writes FOLDER/folders, FOLDER/parquet and so on. Parquet, tars and `metadata` have the rows in the
order of the archive, or, with `--order classes`, in that in which the folders are listed, so that their row ids agree.

The third makes empty files of that many names in 1,000 folders, lists them in a new process, divides them into splits,
and reports seconds and memory.

Prints a table, then one line of JSON; `--record` appends that line to a file.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
from ending import existing_file, run_benchmark
from image_forms import FORMS, encode
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant

from pipeline.data.config import DatasetConfig
from pipeline.data.image_rows import divided
from pipeline.data.image_survey import find_images, read_headers
from pipeline.data.ingest import ingest, load
from pipeline.data.labelled_images import list_images
from pipeline.data.preprocess import preprocess
from pipeline.data.ray_rows import read_split, to_rows
from pipeline.data.rows import RawDataset
from pipeline.devices import cpu_name
from pipeline.storage import Storage, sha256_of_file

STEPS = ("listing", "headers", "ingest", "preprocess")
CLASSES = 1000
"""Folders of `--names`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=existing_file, help="copy of cifar-100-python.tar.gz")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["folders", "parquet", "tars"])
    parser.add_argument("--order", choices=["archive", "classes"], default="archive")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only write the forms below this folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", type=int, help="measure the listing of so many names")
    parser.add_argument("--record", type=Path, help="JSON lines file to which the result is appended")
    args = parser.parse_args()
    if (args.archive is None) == (args.names is None):
        parser.error("give one of --archive and --names")
    if args.record:
        json_lines.begin(args.record)
    if args.names is not None:
        result: dict[str, Any] = {"benchmark": "image_names"} | measure_names(args.names)
        show_names(result)
    else:
        config = DatasetConfig(archive=str(args.archive), sha256=sha256_of_file(args.archive))
        raw = load(config)
        if args.write is not None:
            write(raw, args.forms, args.order, args.write)
            return
        with tempfile.TemporaryDirectory() as folder:
            write(raw, args.forms, args.order, Path(folder))
            rows = measure(raw, args.forms, Path(folder), args.rounds)
        images = len(raw.train) + len(raw.test)
        show(rows, images)
        result = {"benchmark": "image_sources", "images": images, "rounds": args.rounds, "rows": rows}
    result |= {"processor": cpu_name(), "python": platform.python_version()}
    if args.record:
        json_lines.add(args.record, result)
    print(json.dumps(result))


def write(raw: RawDataset, forms: list[str], order: str, folder: Path) -> None:
    splits = encode(raw, order)
    for form in forms:
        FORMS[form](splits, raw, folder / form)
        print(f"{folder / form} is written")


def measure(raw: RawDataset, forms: list[str], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of each step for each form, medians over the rounds."""
    import ray

    from pipeline.workflow.cluster import join_or_start

    join_or_start()
    seconds: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for number in range(rounds):
        for form in forms:
            storage = Storage(str(folder / f"storage-{form}-{number}"))
            found, manifest = run(str(folder / form), storage)
            seconds[form].append(found)
            if number == 0:
                check(raw, manifest, storage)
            storage.delete("")
    ray.shutdown()
    return [
        {"form": form} | {f"{step}_seconds": statistics.median(turn[step] for turn in turns) for step in STEPS}
        for form, turns in seconds.items()
    ]


def run(path: str, storage: Storage) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each step, and the manifest of `preprocess`."""
    seconds, start = {}, time.perf_counter()

    def ended(step: str) -> None:
        nonlocal start
        seconds[step], start = time.perf_counter() - start, time.perf_counter()

    listing = list_images(path)
    ended("listing")
    read_headers(listing, storage, keep=False)
    ended("headers")
    config = find_images(DatasetConfig("files", path=path), storage.uri)
    start = time.perf_counter()
    ingested = ingest(config, storage, "ingest")
    ended("ingest")
    manifest = preprocess(config, ingested, storage, "preprocess")
    ended("preprocess")
    return seconds, manifest


def check(raw: RawDataset, manifest: dict[str, Any], storage: Storage) -> None:
    """Raises an AssertionError unless the shards have the images of the archive with their labels, in any order."""
    parts = [to_rows(read_split(manifest, split, storage)) for split in ("train", "validation")]
    train = np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    test = to_rows(read_split(manifest, "test", storage))
    for (images, labels), expected in ((train, raw.train), ((test.images, test.labels), raw.test)):
        assert contents(images, labels) == contents(expected.images, expected.labels)


def contents(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """Bytes of each image and its label, sorted."""
    return sorted(image.tobytes() + label.tobytes() for image, label in zip(images, labels, strict=True))


def measure_names(count: int) -> dict[str, Any]:
    """Seconds and memory of listing so many files, and of dividing them."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(min(CLASSES, count)):
            (Path(folder) / f"class_{number:04d}").mkdir()
        for number in range(count):
            (Path(folder) / f"class_{number % CLASSES:04d}" / f"image_{number:08d}.jpg").touch()
        process = Contestant(_list_names, folder)
        found = process.wait()
        process.end()
    return {"names": count} | found


def _list_names(answer: Answer, path: str) -> None:
    """Case of a `Contestant`: lists once."""
    before, start = _peak_bytes(), time.perf_counter()
    listing = list_images(path)
    listed = time.perf_counter()
    rows = divided(DatasetConfig("files", path=path), listing)
    assert sum(map(len, rows.values())) == sum(map(len, listing.splits.values()))
    end = time.perf_counter()
    answer({"list_seconds": listed - start, "divide_seconds": end - listed, "bytes": _peak_bytes() - before})


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(rows: list[dict[str, Any]], images: int) -> None:
    table = Table("form", *(f"{step} s" for step in STEPS), *(f"{step} images/s" for step in STEPS[2:]))
    table.title = f"{images:,} images"
    for row in rows:
        seconds = [row[f"{step}_seconds"] for step in STEPS]
        rates = [f"{images / taken:,.0f}" for taken in seconds[2:]]
        table.add_row(row["form"], *(f"{taken:.1f}" for taken in seconds), *rates)
    Console(width=110).print(table)


def show_names(found: dict[str, Any]) -> None:
    table = Table("names", "listing s", "dividing s", "memory MB")
    table.add_row(
        f"{found['names']:,}",
        f"{found['list_seconds']:.1f}",
        f"{found['divide_seconds']:.1f}",
        f"{found['bytes'] / 1e6:.0f}",
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    run_benchmark(main)
