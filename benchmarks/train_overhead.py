"""What do the pipeline and a second worker cost and gain over plain Keras?

    python benchmarks/train_overhead.py --archive cifar-100-python.tar.gz

The preset `cifar100` on real rows, or `quickstart` on scikit-learn's digits where no archive is given:

    (a) plain      keras.Model.fit from arrays in memory, the same augmentation as operations of tf.data
    (b) pipeline   pipeline.fit.fit, one worker
    (c) workers    pipeline.fit.fit, two workers with a thread each

Each in processes of its own, which take turns. A turn is an epoch of `--steps` steps; its images/s count from the end
of the first step to the end of the last, so validation, checkpoint and start-up are left out. Start-up is everything
before the end of the first step. A case with one thread is bound to one core. Required: (b)/(a) at least 0.97,
(c)/(a on one core) 1.85 with the same XLA setting and 1.75 best against best, best (c)/best (a with two threads) 1.1.
"""

import argparse
import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant, medians

from pipeline import presets
from pipeline.batches import ImageArrays
from pipeline.config import PipelineConfig, TrainingConfig
from pipeline.datasets import load

Feed = Literal["tf.data", "generator", "device", "none"]
MANY = 10**6  # epochs of a training that ends when its process is ended


@dataclass(frozen=True)
class Case:
    """What takes part."""

    kind: Literal["plain", "pipeline"]
    threads: int = 1
    num_workers: int = 1
    xla: bool = False
    feed: Feed = "tf.data"
    """Of `plain`: augmentation in tf.data, in pipeline.batches, in the step, or the same batch again and again."""

    @property
    def name(self) -> str:
        feed = f", {self.feed}" if self.kind == "plain" else ""
        what = "workers" if self.num_workers > 1 else self.kind
        return f"{what}{feed}, {self.num_workers} x {self.threads} thread{', XLA' if self.xla else ''}"


@dataclass(frozen=True)
class Job:
    """What all cases train."""

    config: PipelineConfig
    train: ImageArrays
    validation: ImageArrays
    steps: int
    started: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", help="copy of cifar-100-python.tar.gz; without it the digits")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every case")
    parser.add_argument("--steps", type=int, default=17, help="steps of a turn")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--feeds", nargs="+", default=["tf.data"], help="of (a): tf.data, generator, device, none")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of (a) and (b)")
    parser.add_argument("--xla", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--only", nargs="+", choices=["plain", "pipeline", "workers"])
    args = parser.parse_args()

    job, sha256 = make_job(args)
    cases = [
        case
        for xla in (setting == "yes" for setting in args.xla)
        for case in [
            *(Case("plain", threads, 1, xla, feed) for threads in args.threads for feed in args.feeds),
            *(Case("pipeline", threads, 1, xla) for threads in args.threads),
            Case("pipeline", 1, 2, xla),
        ]
        if not args.only or ("workers" if case.num_workers > 1 else case.kind) in args.only
    ]
    rows = compare(cases, job, args.rounds)
    show(rows, f"{job.config.data.source}, batch {job.config.train.global_batch_size}, {args.precision}")
    ratios = targets(rows)
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    result = {"benchmark": "train_overhead", "settings": vars(args), "sha256": sha256, "ratios": ratios, "cases": rows}
    print(json.dumps(result))


def make_job(args: argparse.Namespace) -> tuple[Job, str | None]:
    """Rows and settings, and the SHA-256 of the archive."""
    sha256 = None
    config = presets.quickstart()
    if args.archive:
        config = presets.cifar100()
        with open(args.archive, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        config = replace(config, data=replace(config.data, archive=args.archive, sha256=sha256))
    split = load(config.data).train
    pixels = split.images.astype(np.float32) / 255
    model = replace(
        config.model,
        pixel_mean=tuple(map(float, pixels.mean((0, 1, 2)))),
        pixel_std=tuple(map(float, pixels.std((0, 1, 2)))),
    )
    train = replace(config.train, epochs=MANY, early_stopping_patience=MANY, precision=args.precision)
    rows = args.steps * train.global_batch_size
    if rows + train.global_batch_size > len(split.labels):
        raise SystemExit(f"--steps {args.steps}: there are only {len(split.labels)} training rows")

    def arrays(start: int, stop: int) -> ImageArrays:
        return ImageArrays(np.arange(start, stop), split.images[start:stop], split.labels[start:stop])

    validation = arrays(rows, rows + train.global_batch_size)
    return Job(replace(config, model=model, train=train), arrays(0, rows), validation, args.steps), sha256


def compare(cases: list[Case], job: Job, rounds: int) -> list[dict[str, Any]]:
    """Lets all cases take turns; a case of several workers is a process each, which begin together."""
    teams: list[list[Contestant]] = []
    first: list[float] = []
    try:
        for case in cases:
            start = time.time()
            addresses = [f"127.0.0.1:{port}" for port in free_ports(case.num_workers)]
            teams.append([Contestant(run, case, rank, addresses, job) for rank in range(case.num_workers)])
            for contestant in teams[-1]:
                contestant.wait()
            first.append(time.time() - start)
        rates: list[list[float]] = [[] for _ in cases]
        for _ in range(rounds):
            for team, of_case in zip(teams, rates, strict=True):
                for contestant in team:
                    contestant.begin()
                of_workers = [contestant.wait() for contestant in team]
                of_case.append(of_workers[0])
    finally:
        for team in teams:
            for contestant in team:
                contestant.end()
    rows = []
    for case, seconds, of_case in zip(cases, first, rates, strict=True):
        median, slowest, quickest = medians(of_case)
        rest = (job.steps - 1) * job.config.train.global_batch_size / median
        rows.append(
            {
                "name": case.name,
                **asdict(case),
                "images_per_second": median,
                "range": [slowest, quickest],
                "turns": of_case,
                "start_up_seconds": seconds - rest,
            }
        )
    return rows


def run(answer: Answer, case: Case, rank: int, addresses: list[str], job: Job) -> None:
    """One process: answers images/s after every epoch."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if case.num_workers > 1:
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    elif case.threads == 1:
        # All threads of the process, TensorFlow's for the input too, share the core.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(case.threads)
    tf.config.threading.set_inter_op_parallelism_threads(case.threads)
    if case.kind == "plain":
        run_plain(answer, case, job)
    else:
        if job.config.train.deterministic:  # what pipeline.train does before it calls `fit`
            tf.config.experimental.enable_op_determinism()
        run_pipeline(answer, case, rank, job)


def run_pipeline(answer: Answer, case: Case, rank: int, job: Job) -> None:
    from perceiver.config import PerceiverConfig
    from pipeline.fit import Worker, fit

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        answer(metrics["images_per_second"])

    train = replace(job.config.train, num_workers=case.num_workers, jit_compile=case.xla)
    model = PerceiverConfig(**asdict(job.config.model))
    fit(model, train, job.train, job.validation, Worker(report, rank, case.num_workers))


def run_plain(answer: Answer, case: Case, job: Job) -> None:
    import keras

    from perceiver.model import Perceiver
    from pipeline.optimization import SmoothedCrossEntropy, optimizer

    settings = job.config.train

    class Turns(keras.callbacks.Callback):
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
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(k=5, name="top5_accuracy"),
        ],
        jit_compile=case.xla,
    )
    if case.feed == "device":
        step = model.train_step
        model.train_step = lambda data: step((augmented(data[0], settings), data[1]))
    batches = feed(case.feed, job)
    model.fit(batches, epochs=MANY, steps_per_epoch=job.steps, callbacks=[Turns()], shuffle=False, verbose=0)


def feed(kind: Feed, job: Job) -> Any:
    """Endless batches (B, H, W, C) uint8 and (B,), as the usual tf.data code makes them."""
    import tensorflow as tf

    from pipeline.batches import train_batches

    settings, rows = job.config.train, job.train
    if kind == "generator":
        return tf.data.Dataset.from_generator(
            lambda: train_batches(rows, settings, job.config.model.num_classes, rank=0, num_workers=1),
            output_signature=(
                tf.TensorSpec((settings.global_batch_size, *rows.images.shape[1:]), tf.uint8),
                tf.TensorSpec((settings.global_batch_size,), tf.int32),
            ),
        ).prefetch(tf.data.AUTOTUNE)
    arrays = tf.data.Dataset.from_tensor_slices((rows.images, rows.labels))
    if kind == "none":
        return arrays.batch(settings.global_batch_size, drop_remainder=True).take(1).cache().repeat()
    batches = arrays.shuffle(len(rows.labels)).repeat().batch(settings.global_batch_size, drop_remainder=True)
    if kind == "tf.data":
        batches = batches.map(lambda images, labels: (augmented(images, settings), labels), tf.data.AUTOTUNE)
    return batches.prefetch(tf.data.AUTOTUNE)


def augmented(images: Any, settings: TrainingConfig) -> Any:
    """What `pipeline.batches.augment` does but zoom, as TensorFlow's operations on a batch (B, H, W, C) uint8."""
    import tensorflow as tf

    size, height, width = images.shape[:3]
    pad = settings.random_crop_padding
    if pad:
        corners = tf.random.uniform((size, 2), 0, 2 * pad + 1, tf.int32)
        padded = tf.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), "REFLECT")
        images = tf.gather(padded, corners[:, :1] + tf.range(height), axis=1, batch_dims=1)
        images = tf.gather(images, corners[:, 1:] + tf.range(width), axis=2, batch_dims=1)
    if settings.random_flip:
        images = tf.where(tf.random.uniform((size, 1, 1, 1)) < 0.5, images[:, :, ::-1], images)
    return images


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def targets(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios that are required, of those cases that took part; (a) is the quickest feed."""

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
        ratios[f"(c)/(a on one core){suffix}"] = best("pipeline", 2, 1, (xla,)) / best("plain", 1, 1, (xla,))
    ratios["best (c)/best (a on one core)"] = best("pipeline", 2, 1) / best("plain", 1, 1)
    ratios["best (c)/best (a, 2 threads)"] = best("pipeline", 2, 1) / best("plain", 1, 2)
    return {name: ratio for name, ratio in ratios.items() if ratio == ratio}


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("case", "images/s", "range", "start-up s", title=title)
    for row in rows:
        slowest, quickest = row["range"]
        rate = f"{row['images_per_second']:.0f}"
        table.add_row(row["name"], rate, f"{slowest:.0f} to {quickest:.0f}", f"{row['start_up_seconds']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
