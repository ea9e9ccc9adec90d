"""Memory of the workers and of the driver while they train on more pixels than fit the shuffle window.

    python benchmarks/worker_memory.py --folder /disk/with/40/GB [--rows N] [--record FILE.jsonl] [--figure FILE.svg]

It writes `--rows` images of 64 x 64 x 3 pixels as Parquet of PNG files, trains the preset `quickstart` on two workers
for three epochs with a window of `--window-mb`, and reads the resident memory of all processes of the run twice a
second (Linux only). The same command on the digits of scikit-learn, which fit any window, says what a process needs
anyway. What a worker holds beyond that is compared with the formula of docs/data.md. 700,000 rows are 8.6 GB of pixels.

With `--cgroup /sys/fs/cgroup/memory/NAME` the kernel holds every worker to that need and 1.1 times the formula: it ends
one that takes more. NAME is a folder that the command makes; this needs root.
"""

import argparse
import contextlib
import io
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ending import run_benchmark, stopped_with_this
from PIL import Image
from process_memory import below, in_memory
from rich.console import Console
from rich.table import Table

from pipeline.data.order import MIB, StreamOrder

ROOT = Path(__file__).parents[1]
SIDE, CLASSES, ROWS_OF_FILE, ROWS_OF_GROUP = 64, 10, 10_000, 1_000
WORKERS, EPOCHS, SECONDS = 2, 3, 0.5
DRIVER, WORKER = "driver", "ray::RayTrainWorker"
KERNEL_BYTES = 16 * MIB
"""For page tables, sockets and the like, in a memory cgroup."""
LIMITS = ("memory.max", "memory.limit_in_bytes")


@dataclass
class Memory:
    """Resident memory of the processes of a run."""

    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    """Seconds and bytes of each process, by its id."""
    titles: dict[int, str] = field(default_factory=dict)
    """What each process is; a worker stays one, whatever it executes."""
    unshared: dict[int, int] = field(default_factory=dict)
    """The most bytes of each process that are not mapped from files."""
    epoch_ends: list[float] = field(default_factory=list)

    def peaks(self, title: str, start: float = 0.0, end: float = float("inf")) -> list[int]:
        """The highest value of each process with this title, in bytes."""
        own = [self.samples[pid] for pid, found in self.titles.items() if found == title]
        return [max(size for at, size in rows if start <= at < end) for rows in own if rows[-1][0] >= start]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for images, which are used again, and storage")
    parser.add_argument("--rows", type=int, default=700_000, help="training images")
    parser.add_argument("--batch", type=int, default=64, help="rows of a global batch")
    parser.add_argument("--validation", default="0.01", help="data.validation_fraction")
    parser.add_argument("--window-mb", type=int, default=256, help="train.shuffle_window_mb")
    parser.add_argument("--cgroup", type=Path, help="memory cgroup in which the workers are held to the formula")
    parser.add_argument("--record", type=Path, help="JSON lines file to which the result is appended")
    parser.add_argument("--figure", type=Path, help="SVG file for the curve of memory over time")
    args = parser.parse_args()
    if args.record:
        json_lines.begin(args.record)
    images = args.folder / f"images-{args.rows}"
    write(images, args.rows)
    options = ["--train.shuffle-window-mb", str(args.window_mb), "--train.global-batch-size", str(args.batch)]
    base = run(args.folder / "digits", [*options, "--data.source", "digits"])
    files = ["--data.source", "files", "--data.path", str(images), "--data.validation-fraction", args.validation]
    storage = args.folder / f"files-{args.rows}"
    hold = None
    if args.cgroup:
        run(storage, [*options, *files], until="preprocess")
        anyway = max(base.unshared[pid] for pid, title in base.titles.items() if title == WORKER)
        hold = Hold(args.cgroup, anyway, 1.1 * formula(storage, args.window_mb, args.batch)[0])
    memory = run(storage, [*options, *files], hold=hold)
    run_as = {"rows": args.rows, "batch": args.batch, "held": bool(hold)}
    result = compared(base, memory, *formula(storage, args.window_mb, args.batch)) | run_as
    show(result)
    if args.record:
        json_lines.add(args.record, result)
    if args.figure:
        draw(result, args.figure)
    print(json.dumps({"benchmark": "worker_memory"} | {name: result[name] for name in result if name != "curve"}))


def write(folder: Path, rows: int) -> None:
    """Writes the images: a class is a brightness and each image has noise of its own, so that no two are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": rows, "test": max(CLASSES * 20, rows // 100)}
    written = []
    with ProcessPoolExecutor() as pool:
        for split, count in splits.items():
            for number, start in enumerate(range(0, count, ROWS_OF_FILE)):
                path = folder / f"{split}-{number:05}.parquet"
                if not path.exists():
                    written.append(pool.submit(write_file, path, start, min(ROWS_OF_FILE, count - start)))
        for future in written:
            future.result()  # else a disk that is full would leave fewer images than are recorded


def write_file(path: Path, start: int, count: int) -> None:
    rng = np.random.default_rng([path.name.startswith("test"), start])
    labels = (start + np.arange(count)) % CLASSES
    encoded = []
    for label in labels:
        cells = rng.integers(0, 40, (8, 8, 3), dtype=np.uint8) + np.uint8(20 * label)
        buffer = io.BytesIO()
        Image.fromarray(cells.repeat(8, 0).repeat(8, 1)).save(buffer, "png", compress_level=1)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    part = path.with_suffix(".part")
    table = pa.table({"image": encoded, "label": pa.array(labels)})
    pq.write_table(table, part, row_group_size=ROWS_OF_GROUP)
    part.rename(path)


def run(storage: Path, options: list[str], until: str = "train", hold: "Hold | None" = None) -> Memory:
    """Runs the tasks up to `until`; a training is done again. Returns the memory of all processes."""
    command = [sys.executable, str(ROOT / "pipeline" / "run.py"), "quickstart", "--storage", str(storage)]
    command += ["--until", until, "--search.num-trials", "0", "--train.num-workers", str(WORKERS)]
    command += ["--model.stem", "patches", "--model.patch-size", "8"]  # cheap, so that reading is what it waits for
    command += ["--train.epochs", str(EPOCHS), *options]
    if until == "train":
        command += ["--force", "train"]
    with stopped_with_this(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        with sampled(process.pid, hold) as memory:
            for line in process.stdout:
                print(line, end="", file=sys.stderr, flush=True)
                if any(f"epoch {epoch}/{EPOCHS}: loss" in line for epoch in range(1, EPOCHS + 1)):
                    memory.epoch_ends.append(time.monotonic())
    if process.returncode:
        sys.exit(f"the run ended with code {process.returncode}")
    return memory


@dataclass
class Hold:
    """Holds processes to a limit by a memory cgroup each, of version 1 or 2."""

    folder: Path
    """A memory cgroup, which is made if there is none."""
    anyway: int
    """Bytes that a process may have that are not mapped from files, and"""
    beyond: float
    """bytes that it may take beyond that."""
    limits: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not any((self.folder / name).exists() for name in LIMITS):
            sys.exit(f"{self.folder} is no memory cgroup: it has neither {' nor '.join(LIMITS)}")

    def take(self, pid: int) -> None:
        """A cgroup counts what a process takes after it was moved there, so the limit is less by what it has.

        It also counts what the kernel keeps for the process, but mapped libraries for whoever read them first.
        """
        group = self.folder / str(pid)
        group.mkdir()
        self.limits[pid] = int(self.anyway - in_memory(pid)[1] + self.beyond + KERNEL_BYTES)
        (limit,) = (group / name for name in LIMITS if (group / name).exists())
        limit.write_text(str(self.limits[pid]))
        (group / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def sampled(driver: int, hold: Hold | None = None) -> Iterator[Memory]:
    """Reads the memory of a process and all below it, until the end of the context; holds the workers among them."""
    memory, ended = Memory(), threading.Event()

    def sample() -> None:
        while not ended.wait(SECONDS):
            for pid in below(driver):
                with contextlib.suppress(OSError, KeyError, ValueError):  # it has ended by now
                    title = Path(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()).name
                    if title.startswith(WORKER) or memory.titles.get(pid) == WORKER:
                        title = WORKER
                    if hold and title == WORKER and pid not in hold.limits:
                        hold.take(pid)
                    size, unshared = in_memory(pid)
                    memory.titles[pid] = DRIVER if pid == driver else title
                    memory.samples.setdefault(pid, []).append((time.monotonic(), size))
                    memory.unshared[pid] = max(unshared, memory.unshared.get(pid, 0))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def formula(storage: Path, window_mb: int, batch: int) -> tuple[int, StreamOrder]:
    """Bytes that a worker may hold beyond what it needs anyway, by docs/data.md; and the order of the rows."""
    (manifest,) = (storage / "tasks" / "preprocess").glob("*/manifest.json")
    output = json.loads(manifest.read_text())["output"]
    rows = [shard["rows"] for shard in output["splits"]["train"]["shards"]]
    row = int(np.prod(output["image_shape"]))
    order = StreamOrder.of(rows, row, batch, window_mb * MIB, 0)
    shards = order.lanes // WORKERS * (order.depth + 1) + 2
    return row * (shards * max(rows) + 4 * batch // WORKERS), order


def compared(base: Memory, memory: Memory, allowed: int, order: StreamOrder) -> dict[str, Any]:
    """The memory beyond that of the digits, beside the formula; all in bytes."""
    anyway = max(base.peaks(WORKER))
    begin = min(at for pid, title in memory.titles.items() if title == WORKER for at, _ in memory.samples[pid])
    bounds = [begin, *memory.epoch_ends]
    curve = {
        f"{title} {number}": [(round(at - begin, 1), size) for at, size in memory.samples[pid] if at >= begin]
        for title in (WORKER, DRIVER)
        for number, pid in enumerate(pid for pid, found in memory.titles.items() if found == title)
    }
    return {
        "pixels": sum(order.shard_rows) * SIDE * SIDE * 3,
        "shards": len(order.shard_rows),
        "lanes_of_worker": order.lanes // WORKERS,
        "depth": order.depth,
        "formula": allowed,
        "worker_on_digits": anyway,
        "worker_beyond": max(memory.peaks(WORKER)) - anyway,
        "worker_by_epoch": [max(memory.peaks(WORKER, *ends)) - anyway for ends in itertools.pairwise(bounds)],
        "driver_on_digits": max(base.peaks(DRIVER)),
        "driver_beyond": max(memory.peaks(DRIVER)) - max(base.peaks(DRIVER)),
        "others": {title: max(memory.peaks(title)) for title in set(memory.titles.values()) - {DRIVER, WORKER}},
        "epoch_ends": [round(end - begin, 1) for end in memory.epoch_ends],
        "curve": curve,
    }


def show(result: dict[str, Any]) -> None:
    table = Table("", "MB", title=f"{result['pixels'] / 1e9:.2f} GB of pixels in {result['shards']} shards")
    table.add_row("formula of a worker", f"{result['formula'] / 1e6:.0f}")
    table.add_row("worker, beyond the digits", f"{result['worker_beyond'] / 1e6:.0f}")
    for epoch, size in enumerate(result["worker_by_epoch"], 1):
        table.add_row(f"  in epoch {epoch}", f"{size / 1e6:.0f}")
    table.add_row("driver, beyond the digits", f"{result['driver_beyond'] / 1e6:.0f}")
    for title, size in sorted(result["others"].items(), key=lambda item: -item[1])[:5]:
        table.add_row(f"{title[:60]}, in all", f"{size / 1e6:.0f}")
    Console(width=110).print(table)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws what workers and driver hold beyond the digits, over the time of the training, with the formula."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "worker_memory"  # the same run gives the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for name, points in result["curve"].items():
        base = result["driver_on_digits"] if name.startswith(DRIVER) else result["worker_on_digits"]
        label = name.replace(WORKER, "worker").removesuffix(" 0" if name.startswith(DRIVER) else "")
        axes.plot([at for at, _ in points], [(size - base) / 1e6 for _, size in points], linewidth=1, label=label)
    axes.axhline(result["formula"] / 1e6, color="grey", linestyle="--", linewidth=1, label="formula of a worker")
    for end in result["epoch_ends"]:
        axes.axvline(end, color="lightgrey", linewidth=1)
    axes.set(xlabel="seconds since the workers started; grey: ends of epochs", ylabel="MB beyond the digits")
    axes.set(xlim=(0, None), ylim=(-0.3 * result["formula"] / 1e6, 1.2 * result["formula"] / 1e6))
    axes.legend(loc="lower right")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    run_benchmark(main)
