"""How long a training stands still when one of its workers is killed.

    python benchmarks/recovery.py                          ten kills, 6 minutes on 2 cores
    python benchmarks/recovery.py --no-reserve             without processes in reserve

Trains the embedded digits on two workers with a checkpoint every five steps, and kills a worker chosen at random with
SIGKILL, between `--after` and 1.5 x `--after` seconds after the first checkpoint of its group. The training stands
still from the kill until the next checkpoint. `workers` is the part of it until new workers run and know one another,
`first checkpoint` is the rest: the model is built, its weights restored, and steps are traced and taken. Prints a
table, then one line of JSON.
"""

import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import tyro
from ending import run_benchmark
from rich.console import Console
from rich.table import Table

from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.settings.config import trained_configs
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.training.checkpoint_store import COMMIT_FILE, NAME
from pipeline.training.worker import WorkersStarted
from pipeline.workers.train import train
from pipeline.workflow.channel import Channel

STATE = "training"
WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    kills: int = 10
    """Number of kills."""
    after: float = 20.0
    """Seconds that a group of workers trains at least before one of them is killed."""
    reserve: bool = True
    """Keep processes in reserve."""
    seed: int = 0
    """Seed of the moments and of the workers that are killed."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        stops = measure(options, Storage(folder))
    ray.shutdown()
    seconds = [stop["seconds"] for stop in stops]
    table = Table("", "median", "least", "most", title=f"{options.kills} kills, reserve: {options.reserve}")
    for name in ("seconds", "workers", "first_checkpoint"):
        column = [stop[name] for stop in stops]
        table.add_row(name.replace("_", " "), *(f"{f(column):.1f} s" for f in (statistics.median, min, max)))
    Console(width=120).print(table)
    median = statistics.median(seconds)
    print(json.dumps({"benchmark": "recovery", "reserve": options.reserve, "median_seconds": median, "stops": stops}))


def measure(options: Options, storage: Storage) -> list[dict[str, float]]:
    """Seconds of each standstill, and of its two parts."""
    settings = quickstart()
    manifest = preprocess(settings.data, ingest(settings.data, storage, "ingested"), storage, "data")
    model, config = trained_configs(settings, manifest)
    config = replace(
        config,
        epochs=10**6,
        early_stopping_patience=10**6,
        learning_rate_schedule="constant",
        checkpoint_every_steps=5,
        max_failures=options.kills,
        reserve=options.reserve,
    )
    channel, failures = Channel(), []

    def run() -> None:
        try:
            train(model, config, manifest, storage, state=STATE, channel=channel)
        except BaseException as error:
            failures.append(error)

    training = threading.Thread(target=run, daemon=True)
    training.start()
    choice, stops = random.Random(options.seed), []
    _next_checkpoint(storage, training)
    for _ in range(options.kills):
        time.sleep(options.after * choice.uniform(1, 1.5))
        channel.take()
        killed = time.monotonic()
        os.kill(choice.choice(_workers()), signal.SIGKILL)
        started = _started(channel, training)
        _next_checkpoint(storage, training)
        ended = time.monotonic()
        stops.append({"seconds": ended - killed, "workers": started - killed, "first_checkpoint": ended - started})
        print(json.dumps(stops[-1]), flush=True)
    channel.request_stop()
    training.join(WAIT_SECONDS)
    return stops


def _workers() -> list[int]:
    """Process ids of the training workers on this machine that this process has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes()
            ours = f"PERCEIVER_RECOVERY={os.getpid()}".encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if ours and b"RayTrainWorker" in name:
            found.append(int(process.name))
    return found


def _started(channel: Channel, training: threading.Thread) -> float:
    """Waits until a group of workers runs; returns when it was."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not any(isinstance(event, WorkersStarted) for event in channel.take()):
        assert training.is_alive(), "the training has ended"
        assert time.monotonic() < deadline, "the workers have not started again"
        time.sleep(0.02)
    return time.monotonic()


def _next_checkpoint(storage: Storage, training: threading.Thread) -> None:
    """Waits for a checkpoint that is not there yet; some of those that are may be removed meanwhile."""

    def checkpoints() -> set[str]:
        names = filter(NAME.fullmatch, storage.list(f"{STATE}/checkpoints"))
        return {name for name in names if storage.exists(f"{STATE}/checkpoints/{name}/{COMMIT_FILE}")}

    before, deadline = checkpoints(), time.monotonic() + WAIT_SECONDS
    while checkpoints() <= before:
        assert training.is_alive(), "the training has ended"
        assert time.monotonic() < deadline, "no further checkpoint"
        time.sleep(0.02)


if __name__ == "__main__":
    os.environ["PERCEIVER_RECOVERY"] = str(os.getpid())
    run_benchmark(main)
