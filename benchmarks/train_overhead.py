"""Throughput of the pipeline with one and two workers, compared with plain Keras.

    python benchmarks/train_overhead.py --archive cifar-100-python.tar.gz

The preset is `cifar100` with the archive, or `quickstart` on scikit-learn's digits without one. The cases are:

    (a) plain      keras.Model.fit on arrays in memory, with the crop and flip as tf.data operations, without CutMix
    (b) pipeline   pipeline.training.fit.fit with one worker
    (c) workers    pipeline.training.fit.fit with two workers of one thread each
    (d) streamed   (b) with the training rows read from verified shards on the disk instead of from memory

Each case runs in its own processes, and the cases take turns. A turn is an epoch of `--steps` steps. Its images/s are
measured from the end of the first step to the end of the last, so they exclude validation, checkpoint and start-up.
Start-up is everything before the end of the first step. A case with one thread is bound to one core. The required
ratios are: (b)/(a) at least 0.97; (c)/(a on one core) at least 1.85 with the same XLA setting and at least 1.75 between
the best of each; best (c)/best (a with two threads) at least 1.1; (d)/(b) at least 0.97. The rows of a turn are few:
for (d)/(b) give more `--steps`, so that there are several shards.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from ending import existing_file, run_benchmark
from local_workers import free_addresses, join_cluster
from rich.console import Console
from rich.table import Table
from tf_data_feed import Feed, augmented, feed
from turns import Answer, Contestant, medians

from pipeline.data.ingest import load
from pipeline.data.rows import Rows
from pipeline.data.shard_reader import ShardReader
from pipeline.data.shards import write_rows
from pipeline.data.streamed_rows import StreamedRows
from pipeline.settings import presets
from pipeline.settings.config import PipelineConfig
from pipeline.storage import Storage, sha256_of_file

SHARDS = 40
ENDLESS = 10**6  # more epochs than any training completes before its process is ended


@dataclass(frozen=True)
class Case:
    """A training to measure."""

    kind: Literal["plain", "pipeline", "streamed"]
    threads: int = 1
    num_workers: int = 1
    xla: bool = False
    feed: Feed = "tf.data"
    """Where `plain` augments its batches; the others ignore it."""

    @property
    def name(self) -> str:
        suffix = f", {self.feed}" if self.kind == "plain" else ""
        what = "workers" if self.num_workers > 1 else self.kind
        return f"{what}{suffix}, {self.num_workers} x {self.threads} thread{', XLA' if self.xla else ''}"


@dataclass(frozen=True)
class Job:
    """The model, the rows and the number of steps per epoch that all cases have."""

    config: PipelineConfig
    train: Rows
    validation: Rows
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=existing_file, help="copy of cifar-100-python.tar.gz; default: the digits")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case")
    parser.add_argument("--steps", type=int, default=17, help="training steps in a turn")
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], default="float32")
    parser.add_argument("--feeds", nargs="+", choices=get_args(Feed), default=["tf.data"], help="where (a) augments")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of (a) and (b)")
    parser.add_argument("--xla", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--only", nargs="+", choices=["plain", "pipeline", "workers", "streamed"])
    args = parser.parse_args()

    job, sha256 = make_job(args)
    cases = [
        case
        for xla in (setting == "yes" for setting in args.xla)
        for case in [
            *(Case("plain", threads, 1, xla, feed) for threads in args.threads for feed in args.feeds),
            *(Case("pipeline", threads, 1, xla) for threads in args.threads),
            Case("pipeline", 1, 2, xla),
            *(Case("streamed", threads, 1, xla) for threads in args.threads),
        ]
        if not args.only or ("workers" if case.num_workers > 1 else case.kind) in args.only
    ]
    rows = compare(cases, job, args.rounds)
    show(rows, f"{job.config.data.source}, batch {job.config.train.global_batch_size}, {args.precision}")
    ratios = targets(rows)
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    settings = vars(args) | {"archive": args.archive and str(args.archive)}
    result = {"benchmark": "train_overhead", "settings": settings, "sha256": sha256, "ratios": ratios, "cases": rows}
    print(json.dumps(result))


def make_job(args: argparse.Namespace) -> tuple[Job, str | None]:
    """Settings and rows of the measurement, and the SHA-256 of the archive, None for the digits."""
    sha256 = None
    config = presets.quickstart()
    if args.archive:
        config = presets.cifar100()
        sha256 = sha256_of_file(args.archive)
        config = replace(config, data=replace(config.data, archive=str(args.archive), sha256=sha256))
    split = load(config.data).train
    pixels = split.images.astype(np.float32) / 255
    model = replace(
        config.model,
        pixel_mean=tuple(map(float, pixels.mean((0, 1, 2)))),
        pixel_std=tuple(map(float, pixels.std((0, 1, 2)))),
    )
    train = replace(config.train, epochs=ENDLESS, early_stopping_patience=ENDLESS, precision=args.precision)
    rows = args.steps * train.global_batch_size
    if rows + train.global_batch_size > len(split.labels):
        raise SystemExit(f"--steps {args.steps}: there are only {len(split.labels)} training rows, lower it")
    validation = split.take(slice(rows, rows + train.global_batch_size))
    return Job(replace(config, model=model, train=train), split.take(slice(rows)), validation, args.steps), sha256


def compare(cases: list[Case], job: Job, rounds: int) -> list[dict[str, Any]]:
    """Measures all cases in turns; each worker of a case is a process, and the workers of a case begin together."""
    teams: list[list[Contestant]] = []
    first: list[float] = []
    try:
        for case in cases:
            start = time.time()
            addresses = free_addresses(case.num_workers)
            teams.append([Contestant(run, case, rank, addresses, job) for rank in range(case.num_workers)])
            for contestant in teams[-1]:
                contestant.wait()
            first.append(time.time() - start)
            print(f"{case.name}: ready in {first[-1]:.0f} s", file=sys.stderr, flush=True)
        rates: list[list[float]] = [[] for _ in cases]
        for turn in range(rounds):
            for team, case_rates in zip(teams, rates, strict=True):
                for contestant in team:
                    contestant.begin()
                first_worker, *_ = [contestant.wait() for contestant in team]
                case_rates.append(first_worker)
            print(f"turn {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for team in teams:
            for contestant in team:
                contestant.end()
    rows = []
    for case, seconds, case_rates in zip(cases, first, rates, strict=True):
        median, slowest, fastest = medians(case_rates)
        rest = (job.steps - 1) * job.config.train.global_batch_size / median
        rows.append(
            {
                "name": case.name,
                **asdict(case),
                "images_per_second": median,
                "range": [slowest, fastest],
                "turns": case_rates,
                "start_up_seconds": seconds - rest,
            }
        )
    return rows


def run(answer: Answer, case: Case, rank: int, addresses: list[str], job: Job) -> None:
    """Case of a `Contestant`: a worker, which answers its images/s after each epoch."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if case.num_workers > 1:
        join_cluster(addresses, rank)
    elif case.threads == 1:
        # All threads of the process share the core, including those of TensorFlow's input pipeline.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import tensorflow as tf

    from pipeline.devices import set_up_tensorflow

    if case.kind == "plain":
        set_up_tensorflow(case.threads, use_gpu=False)
        run_plain(answer, case, job)
        return
    if job.config.train.deterministic:  # as pipeline.workers does before it calls `fit`
        tf.config.experimental.enable_op_determinism()
    run_pipeline(answer, case, rank, job)


def run_pipeline(answer: Answer, case: Case, rank: int, job: Job) -> None:
    from perceiver.config import PerceiverConfig
    from pipeline.devices import set_up_tensorflow
    from pipeline.training.fit import fit
    from pipeline.training.parts import num_parts
    from pipeline.training.worker import Worker

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        answer(metrics["images_per_second"])

    train = replace(job.config.train, num_workers=case.num_workers, cpus_per_worker=case.threads, jit_compile=case.xla)
    model = PerceiverConfig(**asdict(job.config.model))
    set_up_tensorflow(case.threads, use_gpu=False, divides_operations=num_parts(model, train) == 1)
    with tempfile.TemporaryDirectory() as folder:
        rows = in_shards(job.train, folder) if case.kind == "streamed" else job.train
        fit(model, train, rows, job.validation, Worker(report, rank, case.num_workers))


def in_shards(rows: Rows, folder: str) -> StreamedRows:
    """The rows in `SHARDS` shards below `folder`, with a window of a quarter of them."""
    storage = Storage(folder)
    parts = np.array_split(np.random.default_rng(0).permutation(len(rows)), SHARDS)
    shards = [write_rows(rows.take(part), storage, f"{number:05d}.parquet") for number, part in enumerate(parts)]
    return StreamedRows(ShardReader(storage), shards, rows.image_shape, rows.images.nbytes // 4)


def run_plain(answer: Answer, case: Case, job: Job) -> None:
    import keras

    from perceiver.model import Perceiver
    from pipeline.training.optimization import Accuracy, SmoothedCrossEntropy, TopKAccuracy, optimizer

    settings = job.config.train

    class Throughput(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            if batch == 0:
                self.start = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            seconds = time.perf_counter() - self.start
            answer((job.steps - 1) * settings.global_batch_size / seconds)

    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision)
    model = Perceiver(**asdict(job.config.model))
    model.build((None, *job.config.model.image_shape))
    model.compile(
        optimizer=optimizer(settings, model, job.steps),
        loss=SmoothedCrossEntropy(settings.label_smoothing),
        metrics=[Accuracy(name="accuracy"), TopKAccuracy(k=5, name="top5_accuracy")],
        jit_compile=case.xla,
    )
    if case.feed == "device":
        step = model.train_step
        model.train_step = lambda data: step((augmented(data[0], settings), data[1]))
    batches = feed(case.feed, job.train, settings, job.config.model.num_classes)
    model.fit(batches, epochs=ENDLESS, steps_per_epoch=job.steps, callbacks=[Throughput()], shuffle=False, verbose=0)


def targets(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The required ratios for which all cases were measured; (a) is the fastest of its feeds."""

    def best(kind: str, workers: int, threads: int, xla: tuple[bool, ...] = (False, True)) -> float:
        return max(
            (
                row["images_per_second"]
                for row in rows
                if (row["kind"], row["num_workers"], row["threads"]) == (kind, workers, threads)
                and row["xla"] in xla
                and row["feed"] != "none"
            ),
            default=float("nan"),
        )

    ratios = {}
    for xla in (False, True):
        suffix = ", XLA" if xla else ""
        for threads in (1, 2):
            ratios[f"(b)/(a), {threads} thread{suffix}"] = best("pipeline", 1, threads, (xla,)) / best(
                "plain", 1, threads, (xla,)
            )
            ratios[f"(d)/(b), {threads} thread{suffix}"] = best("streamed", 1, threads, (xla,)) / best(
                "pipeline", 1, threads, (xla,)
            )
        ratios[f"(c)/(a on one core){suffix}"] = best("pipeline", 2, 1, (xla,)) / best("plain", 1, 1, (xla,))
    ratios["best (c)/best (a on one core)"] = best("pipeline", 2, 1) / best("plain", 1, 1)
    ratios["best (c)/best (a, 2 threads)"] = best("pipeline", 2, 1) / best("plain", 1, 2)
    return {name: ratio for name, ratio in ratios.items() if ratio == ratio}


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("case", "images/s", "range", "start-up s", title=title)
    for row in rows:
        slowest, fastest = row["range"]
        rate = f"{row['images_per_second']:.0f}"
        table.add_row(row["name"], rate, f"{slowest:.0f} to {fastest:.0f}", f"{row['start_up_seconds']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    run_benchmark(main)
