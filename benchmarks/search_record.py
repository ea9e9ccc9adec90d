"""Learning curves of many points of the search space, on which search_replay.py replays searches.

    python benchmarks/search_record.py --archive cifar-100-python.tar.gz --lines curves.jsonl
    python benchmarks/search_record.py --lines curves.jsonl --pack benchmarks/data/search_curves.json.gz

Points are drawn at random and trained to the end without early stopping: 120 of them in about 30 minutes on 2 cores, as
many at a time as there are cores, on one core each. Each finished curve is appended to `--lines`, and the same command
continues from there. `--pack` compresses the lines into one file. Accuracy is measured on the validation rows.

The models are small and the rows few, so that a curve takes seconds. The results of a replay hold for such curves.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
from ending import existing_file, run_benchmark

from perceiver.cost import macs_per_image, parameter_count
from pipeline.data.config import DatasetConfig
from pipeline.data.rows import Rows
from pipeline.settings.config import ModelConfig
from pipeline.settings.presets import PRESETS
from pipeline.storage import sha256_of_file
from pipeline.training.config import TrainingConfig
from tune.config import SearchConfig
from tune.space import Space, to_model, training_values

SEARCH = SearchConfig(
    num_latents=(4, 8, 16),
    latent_dim=(24, 32, 48, 64),
    num_self_attention_heads=(1, 2, 4, 8, 16),
    num_iterations=(1, 2, 3),
    num_self_attention_blocks=(1, 2),
    learning_rate=(3e-4, 2e-2),
    weight_decay=(1e-3, 0.5),
)
SMALLER: dict[str, Any] = {"conv_channels": 16, "data_dim": 32, "num_cross_attention_heads": 1}
CURVE = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")


@dataclass(frozen=True)
class Settings:
    """Settings on which the curves depend. Lines with other settings are not continued."""

    train_rows: int
    validation_rows: int
    epochs: int
    global_batch_size: int
    seed: int


def recipe(settings: Settings) -> tuple[ModelConfig, TrainingConfig]:
    """Model and training of a curve before a sample changes them: the preset at the time of the recording."""
    base = PRESETS["cifar100"]()
    train = replace(
        base.train,
        epochs=settings.epochs,
        global_batch_size=settings.global_batch_size,
        num_workers=1,
        optimizer="adamw",
        precision="float32",
        seed=settings.seed,
    )
    return replace(base.model, **SMALLER), train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=existing_file, help="copy of cifar-100-python.tar.gz")
    parser.add_argument("--lines", type=Path, required=True, help="JSON lines file of finished curves")
    parser.add_argument("--pack", type=Path, help="file for the compressed lines; nothing is trained")
    parser.add_argument("--curves", type=int, default=120)
    parser.add_argument("--train-rows", type=int, default=5000)
    parser.add_argument("--validation-rows", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="curves that are trained at the same time"
    )
    args = parser.parse_args()
    if args.pack:
        pack(args.lines, args.pack)
        return
    if args.archive is None:
        parser.error("give --archive")
    settings = Settings(args.train_rows, args.validation_rows, args.epochs, args.global_batch_size, args.seed)
    finished = finished_curves(args.lines, settings)
    missing = [number for number in range(args.curves) if number not in finished]
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        free = manager.Queue()
        for job in range(args.jobs):
            free.put(cores[job % len(cores)])
        with ProcessPoolExecutor(args.jobs, context, start, (free, str(args.archive), settings)) as pool:
            try:
                for future in as_completed([pool.submit(curve, number, settings) for number in missing]):
                    row = future.result()
                    json_lines.add(args.lines, row)
                    print(progress_line(row), file=sys.stderr, flush=True)
            except BaseException:  # a signal or an error: nobody takes the curves that are left
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.kill()
                raise


def finished_curves(lines: Path, settings: Settings) -> set[int]:
    """Numbers of the finished curves. Creates a missing file, with the settings as its first line.

    Raises:
        ValueError: if the curves of the file have other settings.
    """
    if not json_lines.begin(lines):
        json_lines.add(lines, {"settings": vars(settings), "search": vars(SEARCH), "model": SMALLER})
    head, *rows = json_lines.read(lines)
    if head.get("settings") != vars(settings):
        raise ValueError(f"{lines} has curves with {head.get('settings')}, not {vars(settings)}: give another --lines")
    return {row["number"] for row in rows}


def pack(lines: Path, target: Path) -> None:
    """Writes the settings and the curves of `lines` to one compressed file, the record."""
    head, *rows = json_lines.read(lines) or [{}]
    if not rows:
        raise ValueError(f"{lines} has no curves")
    target.parent.mkdir(parents=True, exist_ok=True)
    contents = json.dumps(head | {"curves": sorted(rows, key=lambda row: row["number"])}, separators=(",", ":"))
    with gzip.GzipFile(target, "wb", mtime=0) as file:  # the same lines give the same bytes
        file.write(contents.encode())
    best = [max(epoch["val_accuracy"] for epoch in row["epochs"]) for row in rows]
    print(
        f"{len(rows)} curves, best {max(best):.4f}, median {statistics.median(best):.4f}, {target.stat().st_size} bytes"
    )


@cache
def unpack(record: Path) -> dict[str, Any]:
    """The contents of a packed record: `settings`, `search`, `model` and `curves`."""
    with gzip.open(record) as file:
        return json.load(file)


def progress_line(row: dict[str, Any]) -> str:
    """A finished curve as a line of progress: number, last accuracy, seconds and sample."""
    sample = " ".join(f"{name}={value:.3g}" for name, value in row["sample"].items())
    return f"{row['number']:4} {row['epochs'][-1]['val_accuracy']:.4f} {row['seconds']:6.1f} s  {sample}"


_data: tuple[Rows, Rows]


def start(free: Any, archive: str, settings: Settings) -> None:
    """Binds this process to a core of its own and loads the rows."""
    global _data
    os.sched_setaffinity(0, {free.get()})
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _data = load_rows(archive, settings)


def load_rows(archive: str, settings: Settings) -> tuple[Rows, Rows]:
    """Training and validation rows, with the classes as balanced as possible."""
    from pipeline.data.ingest import load
    from pipeline.data.rows import stratified_split

    rows = load(DatasetConfig(archive=archive, sha256=sha256_of_file(archive))).train
    wanted = settings.train_rows + settings.validation_rows
    _, some = stratified_split(rows.labels, wanted / len(rows.labels), settings.seed)
    kept, held_out = stratified_split(rows.labels[some], settings.validation_rows / len(some), settings.seed)
    return rows.take(some[kept]), rows.take(some[held_out])


def curve(number: int, settings: Settings) -> dict[str, Any]:
    """Draws the point with this number, trains it to the end, and returns its learning curve."""
    import keras

    from pipeline.training.worker import Worker
    from pipeline.workers.in_process import train_in_process

    keras.utils.clear_session()  # frees the model of the previous curve
    train, validation = _data
    base, config = recipe(settings)
    pixels = train.images / np.float32(255)
    mean, std = (tuple(map(float, f((0, 1, 2), dtype=np.float64))) for f in (pixels.mean, pixels.std))
    base = replace(base, pixel_mean=mean, pixel_std=std)
    sample = Space.of(SEARCH, base).draw(random.Random(f"{settings.seed}/{number}"))
    model = to_model(sample, base)
    epochs: list[dict[str, float]] = []

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        epochs.append({name: float(f"{metrics[name]:.6g}") for name in CURVE})

    began = time.perf_counter()
    train_in_process(model, replace(config, **training_values(sample)), train, validation, Worker(report=report))
    return {
        "number": number,
        "sample": sample,
        "parameters": parameter_count(model),
        "gmacs": macs_per_image(model) / 1e9,
        "seconds": time.perf_counter() - began,
        "epochs": epochs,
    }


if __name__ == "__main__":
    run_benchmark(main)
