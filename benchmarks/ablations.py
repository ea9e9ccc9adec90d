"""Ablations: the validation accuracy of each variant of a model or recipe, at equal cost.

    python benchmarks/ablations.py cifar100 --archive cifar-100-python.tar.gz --record ablations.jsonl
    python benchmarks/ablations.py cifar100 --archive ... --steps 2000 --only "no CutMix" AdamW
    python benchmarks/ablations.py paper --archive ... --equal steps --seeds 0 1 2
    python benchmarks/ablations.py cifar100_pixels --archive ... --equal operations --steps 1000 --seeds 0 1 2
    python benchmarks/ablations.py digits --steps 900 --seeds 0 1 2

The studies are in ablation_studies.py. The base of a study is a preset with some settings changed; each variant changes
further settings. Every variant gets the same budget: the time that the base needs for `--steps` training steps on one
core. The step of a variant is timed first, in turns with a step of the base, and the budget is divided by it. The load
of the machine during the training therefore does not affect the result. With `--equal operations` the
multiply-accumulates of a step take the place of its time, and with `--equal steps` each variant gets as many steps as
the base. The learning-rate schedule always ends with the budget.

Where TensorFlow sees a GPU, the trainings share it; TF_FORCE_GPU_ALLOW_GROWTH=true lets each take only the memory that
it needs. Each finished training is appended to `--record` as a line, and the same command continues from there.
Accuracy is measured on the validation rows; the test rows are not read.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
from ablation_studies import STUDIES, Changes, configure
from ending import existing_file, run_benchmark
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant

from perceiver.cost import macs_per_image, parameter_count
from pipeline.data.ingest import load
from pipeline.data.rows import Rows, stratified_split
from pipeline.devices import load_cusolver, used_device
from pipeline.fields import keyed
from pipeline.settings.config import PipelineConfig
from pipeline.training.batches import steps_per_epoch
from pipeline.training.config import TrainingConfig

BASE = "as it is"  # name of the base in tables and records
STEPS_PER_TURN = 10
FIELDS = ("study", "steps", "equal", "variant", "seed", "settings", "relative_step_time", "val_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--archive", type=existing_file, help="copy of cifar-100-python.tar.gz")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the base that set the budget")
    parser.add_argument(
        "--equal", choices=("time", "operations", "steps"), default="time", help="budget that all variants share"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants to train; default: all")
    parser.add_argument("--record", type=Path, help="JSON lines file of finished trainings, to continue from")
    parser.add_argument("--rounds", type=int, default=5, help="turns in which a step is timed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings that run at the same time")
    args = parser.parse_args()
    study = STUDIES[args.study]
    if unknown := set(args.only or ()) - set(study.variants):
        parser.error(f"--only {' '.join(sorted(unknown))}: the variants are {', '.join(study.variants)}")
    chosen: dict[str, Changes] = {BASE: {}} | {name: study.variants[name] for name in args.only or study.variants}
    archive = args.archive and str(args.archive)
    configs = {name: configure(study, changes, archive) for name, changes in chosen.items()}
    budget = {"study": args.study, "steps": args.steps, "equal": args.equal}
    recorded = json_lines.begin(args.record, FIELDS) if args.record else []
    done = [row for row in recorded if budget.items() <= row.items()]
    done = [row for row in done if row["settings"] == settings_of(configs.get(row["variant"]))]
    ratios = {BASE: 1.0} | {row["variant"]: row["relative_step_time"] for row in done}
    for name in configs.keys() - ratios.keys() if args.equal == "time" else ():
        ratios[name] = relative_step_time(configs[name], configs[BASE], args.rounds)
        print(f"{name}: {ratios[name]:.2f} times the base's step", file=sys.stderr, flush=True)
    runs = [(name, seed) for seed in args.seeds for name in configs]
    runs = [run for run in runs if run not in {(row["variant"], row["seed"]) for row in done}]

    running: set[Contestant] = set()

    def train(variant: str, seed: int) -> dict[str, Any]:
        ratio = ratios.get(variant) if args.equal == "time" else None
        relative_cost = ratio or 1.0
        if args.equal == "operations":
            relative_cost = cost_of_step(configs[variant]) / cost_of_step(configs[BASE])
        steps = max(1, round(args.steps / relative_cost))
        contestant = Contestant(train_and_validate, configs[variant], steps, seed)
        running.add(contestant)
        try:
            metrics = contestant.wait()
        finally:
            running.remove(contestant)
            contestant.end()
        run = {"variant": variant, "seed": seed, "relative_step_time": ratio, "steps_taken": steps}
        return budget | run | metrics | {"settings": settings_of(configs[variant])}

    pool = ThreadPoolExecutor(args.jobs)
    futures = [pool.submit(train, *run) for run in runs]
    try:
        for future in as_completed(futures):
            row = future.result()
            done.append(row)
            if args.record:
                json_lines.add(args.record, row)
            print(f"{row['variant']}, seed {row['seed']}: {row['val_accuracy']:.4f}", file=sys.stderr, flush=True)
    finally:  # after a signal or an error nobody takes the results of the others
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):
            for contestant in tuple(running):
                contestant.kill()
            time.sleep(0.1)
    shown = [row for row in done if row["variant"] in configs and row["seed"] in args.seeds]
    show(shown, args.steps, args.equal)
    print(json.dumps({"benchmark": "ablations", **budget, "runs": shown}))


def settings_of(config: PipelineConfig | None) -> dict[str, Any] | None:
    """The settings that decide the result of a training, except its steps and its seed; None for no configuration.

    The path of the archive is left out, and so are settings that only a training of several epochs uses.
    """
    if config is None:
        return None
    data = {"source": config.data.source, "sha256": config.data.sha256, "seed": config.data.seed}
    unused = {"epochs", "seed", "warmup_epochs", "early_stopping_patience", "plateau_patience"}
    train = {name: value for name, value in keyed(config.train).items() if name not in unused}
    return json.loads(json.dumps({"data": data, "model": keyed(config.model), "train": train}))  # tuples become lists


def cost_of_step(config: PipelineConfig) -> int:
    """Multiply-accumulates of the forward pass of a batch."""
    return macs_per_image(config.model) * config.train.global_batch_size


def relative_step_time(config: PipelineConfig, base: PipelineConfig, rounds: int) -> float:
    """Duration of a training step relative to a step of `base`: the median ratio over `rounds` turns of both."""
    contestants = [Contestant(time_steps, config), Contestant(time_steps, base)]
    try:
        for contestant in contestants:
            contestant.wait()
        turns = [[contestant.turn() for contestant in contestants] for _ in range(rounds)]
    finally:
        for contestant in contestants:
            contestant.end()
    return statistics.median(own / reference for own, reference in turns)


def time_steps(answer: Answer, config: PipelineConfig) -> None:
    """Case of a `Contestant`: answers the seconds per step in each turn."""
    model, train, _ = prepare(config, steps=1000, seed=0)
    # Not with `fit`, because closing a tf.data iterator may take seconds.
    images, labels = next(iter(train))
    model.train_on_batch(images, labels)
    answer(None)
    while True:
        start = time.perf_counter()
        for _ in range(STEPS_PER_TURN):
            model.train_on_batch(images, labels)
        answer((time.perf_counter() - start) / STEPS_PER_TURN)


def train_and_validate(answer: Answer, config: PipelineConfig, steps: int, seed: int) -> None:
    """Case of a `Contestant`: trains for `steps` steps and answers the metrics on the validation rows."""
    model, train, validation = prepare(config, steps, seed)
    history = model.fit(train, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0).history
    metrics = model.evaluate(validation.images, validation.labels, batch_size=500, verbose=0, return_dict=True)
    answer(
        {f"val_{name}": float(value) for name, value in metrics.items()}
        | {"loss": float(history["loss"][-1])}
        | {"parameters": parameter_count(config.model), "mmacs": macs_per_image(config.model) / 1e6}
        | {"device": used_device()}
    )


def prepare(config: PipelineConfig, steps: int, seed: int) -> tuple[Any, Any, Rows]:
    """A compiled model, its endless training batches, and the validation rows.

    Args:
        config: Settings of model, training and data.
        steps: Training steps, over which the learning-rate schedule runs.
        seed: Seed of the weights and of the order and augmentation of the rows.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    from perceiver import Perceiver
    from pipeline.training.input_pipeline import training_dataset
    from pipeline.training.optimization import Accuracy, SmoothedCrossEntropy, TopKAccuracy, optimizer

    load_cusolver()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(config.train.precision)
    rows = load(config.data).train
    kept, held_out = stratified_split(rows.labels, config.data.validation_fraction, config.data.seed)
    train, validation = (rows.take(positions) for positions in (kept, held_out))
    pixels = train.images / np.float32(255)
    mean, std = (tuple(map(float, f((0, 1, 2), dtype=np.float64))) for f in (pixels.mean, pixels.std))
    # A single epoch of `steps` steps, so that the cosine schedule ends with it. The first tenth is the warm-up.
    settings = replace(config.train, epochs=1, warmup_epochs=0.1, seed=seed)
    model = Perceiver(**asdict(replace(config.model, pixel_mean=mean, pixel_std=std)))
    model.build()
    model.compile(
        optimizer(settings, model, steps),
        SmoothedCrossEntropy(settings.label_smoothing),
        metrics=[Accuracy(name="accuracy"), TopKAccuracy(5, name="top5_accuracy")],
        jit_compile=config.train.jit_compile,
    )
    return model, training_dataset(train, over_steps(settings, steps, len(train)), config.model.num_classes), validation


def over_steps(settings: TrainingConfig, steps: int, num_rows: int) -> TrainingConfig:
    """`settings` whose epochs are the passes over the rows in so many steps: some augmentation depends on them."""
    return replace(settings, epochs=math.ceil(steps / steps_per_epoch(num_rows, settings.global_batch_size)))


def show(runs: list[dict[str, Any]], steps: int, equal: str) -> None:
    """Prints a row per variant, the best first: means over the seeds, and the range of the top-1 accuracy."""
    columns = ("variant", "parameters", "MMAC", "time a step", "steps", "seeds", "top-1", "lowest to highest")
    table = Table(
        *columns, "top-5", "loss", title=f"Budget: {steps:,} steps of the base, equal {equal}; validation rows"
    )
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)

    def mean(name: str, variant: str) -> float:
        return statistics.mean(run[name] for run in by_variant[variant])

    for variant in sorted(by_variant, key=lambda variant: -mean("val_accuracy", variant)):
        first, accuracies = by_variant[variant][0], [run["val_accuracy"] for run in by_variant[variant]]
        table.add_row(
            variant,
            f"{first['parameters']:,}",
            f"{first['mmacs']:.1f}",
            "" if first["relative_step_time"] is None else f"{first['relative_step_time']:.2f}",
            f"{first['steps_taken']:,}",
            str(len(accuracies)),
            f"{mean('val_accuracy', variant):.2%}",
            f"{min(accuracies):.2%} to {max(accuracies):.2%}",
            f"{mean('val_top5_accuracy', variant):.2%}",
            f"{mean('val_loss', variant):.3f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    run_benchmark(main)
