"""Reading of shuffled training batches: this project's reader, TFRecord, Grain with ArrayRecord, MosaicML streaming.

    python benchmarks/streaming.py --cache FOLDER [--rounds 5] [--record FILE]
    python benchmarks/streaming.py --cache FOLDER --archive cifar-100-python.tar.gz

All read the same images, 64 x 64 x 3 uint8, in global batches of 256 from local files in the page cache, each in a
process that is bound to one core, in turns of an epoch. The images are noise, which no format can compress; with an
archive they are those of CIFAR-100, enlarged. Before it is timed, each reads an epoch in which every row is compared
with what was written. Then it is timed:

- rows/s and MB/s: an epoch, from the opening of the files to the last batch;
- the time from the start of a process to its first batch: fresh, and in the middle of an epoch;
- of this project's reader also the same rows in 1, 10, 100 and 1,000 shards.

`benchmarks/stream_readers` has a file for each reader, with what is set. Grain and MosaicML run in environments of
their own, which the first run makes below `--cache` with the versions of `PEERS`. That and the writing of the data take
some minutes, and so does the measurement. The aims are: at least 0.6 times the rows/s of TFRecord, which neither
verifies SHA-256 nor resumes, 2 times those of Grain, and 1 time those of MosaicML.

Prints tables, then one line of JSON; `--record` appends that line to a file.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
from ending import existing_file, run_benchmark
from environments import environment
from rich.console import Console
from rich.table import Table

from pipeline.devices import cpu_name
from pipeline.storage import sha256_of_file

READERS = Path(__file__).parent / "stream_readers"
OWN = "shards"
PEERS: Mapping[str, tuple[str, ...]] = {
    "tfrecord": (),  # the project's own environment has TensorFlow
    "grain": ("grain==0.2.18", "array-record==0.8.3", "numpy==2.4.6"),
    "mosaicml": ("mosaicml-streaming==0.13.0", "torch==2.13.0", "numpy==2.1.3"),
}
"""Pinned packages of the environment of each."""
AIMS = {"tfrecord": 0.6, "grain": 2.0, "mosaicml": 1.0}
"""Least rows/s of this project's reader, as multiples of each peer's."""
SIDE, CHANNELS = 64, 3
BATCH_ROWS = 256  # as in stream_readers/contest.py
ROW_BYTES = SIDE * SIDE * CHANNELS
SHARDS = 44
"""Of 60,000 rows: 16 MiB of pixels each, the most that `preprocess` writes."""
STARTS = 3
"""Processes of each reader whose start is measured, fresh and resumed."""
END_SECONDS = 60
"""Time for a process to end by itself; MosaicML then removes its shared memory, which would disturb the next one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for environments and data, which are kept")
    parser.add_argument("--archive", type=existing_file, help="copy of cifar-100-python.tar.gz; default: noise")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--shards", nargs="*", type=int, default=[1, 10, 100, 1000], help="further numbers of shards")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="core to which all are bound")
    parser.add_argument("--record", type=Path, help="JSON lines file to which the result is appended")
    args = parser.parse_args()
    if args.rows < BATCH_ROWS:
        parser.error(f"--rows {args.rows}: give at least the {BATCH_ROWS} of a batch")
    if args.record:
        json_lines.begin(args.record)
    pixels = images_file(args.cache, args.archive, args.rows)
    names = [OWN, *args.peers]
    entries = {name: Entry(name, args.cache, pixels, SHARDS, args.core) for name in names}
    entries |= {f"{OWN} {count}": Entry(OWN, args.cache, pixels, count, args.core) for count in args.shards}
    rows = compare(entries, args.rounds, args.rows)
    main_rows, shard_rows = rows[: len(names)], rows[len(names) :]
    source = "noise" if args.archive is None else "CIFAR-100"
    show(main_rows, f"{args.rows:,} rows of {SIDE} x {SIDE} x {CHANNELS}, {source}")
    if shard_rows:
        show(shard_rows, "this project's reader by the number of shards")
    ratios = {row["reader"]: main_rows[0]["rows_per_second"] / row["rows_per_second"] for row in main_rows[1:]}
    for name, ratio in ratios.items():
        print(f"{OWN} / {name}: {ratio:.2f} (aim: {AIMS[name]:g})")
    result = {
        "benchmark": "streaming",
        "pixels": source,
        "rows": args.rows,
        "rounds": args.rounds,
        "processor": cpu_name(),
        "python": platform.python_version(),
        "ratios": ratios,
        "readers": rows,
    }
    if args.record:
        json_lines.add(args.record, result)
    print(json.dumps(result))


def images_file(cache: Path, archive: Path | None, rows: int) -> Path:
    """The images uint8 (rows, 64, 64, 3) as an .npy file, which is made if it is not there."""
    path = cache / f"{'noise' if archive is None else sha256_of_file(archive)[:8]}-{rows}.npy"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    if archive is None:
        images = np.random.default_rng(0).integers(0, 256, (rows, SIDE, SIDE, CHANNELS), dtype=np.uint8)
    else:
        images = enlarged(archive, rows)
    unfinished = path.with_suffix(".part.npy")
    np.save(unfinished, images)
    unfinished.rename(path)
    return path


def enlarged(archive: Path, rows: int) -> np.ndarray:
    """The first images of CIFAR-100 at twice their height and width."""
    from PIL import Image

    from pipeline.data.config import DatasetConfig
    from pipeline.data.ingest import load

    raw = load(DatasetConfig(archive=str(archive), sha256=sha256_of_file(archive)))
    small = np.concatenate([raw.train.images, raw.test.images])[:rows]
    if len(small) < rows:
        raise SystemExit(f"--rows {rows}: the archive has {len(small)} images, lower it")
    size = (SIDE, SIDE)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small])


class Entry:
    """A reader with its environment and its data, which are made if they are not there."""

    def __init__(self, name: str, cache: Path, pixels: Path, shards: int, core: int) -> None:
        self.name, self.shards = name, shards
        self._core, self._pixels = core, pixels
        self._python = environment(name, PEERS.get(name, ()), cache)
        self._folder = cache / f"{pixels.stem}-{name}-{shards}"
        if not self._folder.exists():
            unfinished = self._folder.with_name(f"{self._folder.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            subprocess.run(self._command("write", unfinished, shards), check=True, env=_environment())
            unfinished.rename(self._folder)

    def start(self, step: int = 0) -> tuple[float, subprocess.Popen[str]]:
        """Starts a process; seconds until it had its first batch, that of `step`, and the process."""
        core, start = self._core, time.perf_counter()
        process = subprocess.Popen(
            self._command("read", self._folder, step),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # before it imports anything
        )
        self.answer(process)
        return time.perf_counter() - start, process

    def answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the reader {self.name} ended with exit code {process.wait()}, see above")
        return line

    def epoch(self, process: subprocess.Popen[str], what: str) -> dict[str, float]:
        """Lets the process read an epoch, to `check` or to `time` it."""
        assert process.stdin is not None
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        return json.loads(self.answer(process))

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        """Ends a process that waits for a line."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _command(self, what: str, folder: Path, number: int) -> list[str]:
        script = READERS / f"{self.name}_reader.py"
        return [str(self._python), str(script), what, str(self._pixels), str(folder), str(number)]


def _environment() -> dict[str, str]:
    """That of this process, without messages that its libraries print when they find no GPU."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}


def compare(entries: Mapping[str, Entry], rounds: int, rows: int) -> list[dict[str, Any]]:
    """Measures all readers in turns."""
    steps = rows // BATCH_ROWS
    first: dict[str, list[float]] = {name: [] for name in entries}
    resumed: dict[str, list[float]] = {name: [] for name in entries}
    processes: dict[str, subprocess.Popen[str]] = {}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in entries}
    try:
        for _ in range(min(rounds, STARTS)):
            for name, entry in entries.items():
                for step, found in ((0, first[name]), (steps // 2, resumed[name])):
                    seconds, process = entry.start(step)
                    found.append(seconds)
                    entry.end(process)
        for name, entry in entries.items():
            _, processes[name] = entry.start()
            checked = entry.epoch(processes[name], "check")
            if checked["rows"] != steps * BATCH_ROWS:
                raise SystemExit(f"the reader {name} gave {checked['rows']} rows, expected {steps * BATCH_ROWS}")
        for _ in range(rounds):
            for name, entry in entries.items():
                turns[name].append(entry.epoch(processes[name], "time"))
    finally:
        for process in processes.values():
            Entry.end(process)
    return [
        {
            "reader": entries[name].name,
            "shards": entries[name].shards,
            "rows_per_second": statistics.median(turn["rows"] / turn["seconds"] for turn in found),
            "rows_per_core_second": statistics.median(turn["rows"] / turn["cpu"] for turn in found),
            "turns": [turn["rows"] / turn["seconds"] for turn in found],
            "first_batch_seconds": statistics.median(first[name]),
            "resumed_seconds": statistics.median(resumed[name]),
        }
        for name, found in turns.items()
    ]


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("reader", "shards", "rows/s", "MB/s", "range of rows/s", "first batch s", "resumed s", title=title)
    for row in rows:
        table.add_row(
            row["reader"],
            f"{row['shards']:,}",
            f"{row['rows_per_second']:,.0f}",
            f"{row['rows_per_second'] * ROW_BYTES / 1e6:,.0f}",
            f"{min(row['turns']):,.0f} to {max(row['turns']):,.0f}",
            f"{row['first_batch_seconds']:.2f}",
            f"{row['resumed_seconds']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    run_benchmark(main)
