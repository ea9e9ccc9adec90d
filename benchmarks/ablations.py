"""What does each choice of shape or recipe bring, at equal cost?

    python benchmarks/ablations.py cifar100 --archive cifar-100-python.tar.gz --record ablations.jsonl
    python benchmarks/ablations.py cifar100 --archive ... --steps 2000 --only "no CutMix" AdamW
    python benchmarks/ablations.py paper --archive ... --equal steps --seeds 0 1 2
    python benchmarks/ablations.py digits --steps 900 --seeds 0 1 2

A study begins with a preset, some of whose settings it may change: its base. Each variant changes some more. The budget
is the time that the base needs for `--steps` training steps on one core, as much for every variant: a step of each is
timed beside a step of the base first, in turns, and the budget divided by it. So what else the machine does while they
train changes nothing. With `--equal steps` each gets as many steps as the base. The whole learning-rate schedule lies
within the budget.

Each finished training is a line of `--record`; the same command goes on after the last. Judged on the validation rows;
the test rows are not read.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import json_lines
import numpy as np
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant

from perceiver.cost import macs_per_image, parameter_count
from pipeline.batches import ImageArrays
from pipeline.config import PipelineConfig, keyed
from pipeline.datasets import load
from pipeline.preprocess import stratified_split
from pipeline.presets import PRESETS

BASE = "as it is"
STEPS_A_TURN = 10
Changes = dict[str, Any]
# 16 bands are 66 features; with 126 channels that is the width of the latents, which four heads divide.
FOURIER_POSITIONS: Changes = {
    "model.position_encoding": "fourier",
    "model.position_combination": "concat",
    "model.data_dim": 126,
}


@dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        preset: of the pipeline, which `base` changes.
        base: settings that all variants have, by name: `model.num_latents`, `train.optimizer`.
        variants: settings of each variant besides.
    """

    preset: str
    base: Changes
    variants: dict[str, Changes]


STUDIES = {
    "cifar100": Study(
        "cifar100",
        {},
        {
            "8 latents": {"model.num_latents": 8},
            "32 latents": {"model.num_latents": 32},
            "latents of 128": {"model.latent_dim": 128},
            "latents of 256": {"model.latent_dim": 256},
            "4 iterations of 1 block": {"model.num_iterations": 4, "model.num_self_attention_blocks": 1},
            "1 iteration of 4 blocks": {"model.num_iterations": 1, "model.num_self_attention_blocks": 4},
            "iterations do not share": {"model.share_weights": False},
            "1 head in the cross-attention": {"model.num_cross_attention_heads": 1},
            "32 channels in the stem": {"model.conv_channels": 32},
            "128 channels in the stem": {"model.conv_channels": 128},
            "pooling does not overlap": {"model.conv_pool_size": 2},
            "4 x 4 patches": {"model.stem": "patches"},
            "4 x 4 patches, Fourier": {"model.stem": "patches", **FOURIER_POSITIONS},
            "Fourier positions": FOURIER_POSITIONS,
            "query head": {"model.head": "query"},
            "tanh GELU": {"model.approximate_gelu": True},
            "dropout 0.1": {"model.dropout": 0.1},
            "AdamW": {"train.optimizer": "adamw", "train.learning_rate": 2e-3},
            "AdamW, 1e-3": {"train.optimizer": "adamw", "train.learning_rate": 1e-3},
            "AdamW, 4e-3": {"train.optimizer": "adamw", "train.learning_rate": 4e-3},
            "LAMB": {"train.optimizer": "lamb", "train.learning_rate": 1e-2},
            "LAMB, 5e-3": {"train.optimizer": "lamb", "train.learning_rate": 5e-3},
            "LAMB, 2e-2": {"train.optimizer": "lamb", "train.learning_rate": 2e-2},
            "2e-3": {"train.learning_rate": 2e-3},
            "8e-3": {"train.learning_rate": 8e-3},
            "weight decay 0.2": {"train.weight_decay": 0.2},
            "weight decay 0.01": {"train.weight_decay": 0.01},
            "batch of 64": {"train.global_batch_size": 64},
            "batch of 256": {"train.global_batch_size": 256},
            "no label smoothing": {"train.label_smoothing": 0.0},
            "no CutMix": {"train.cutmix": 0.0},
            "CutMix in all images": {"train.cutmix": 1.0},
            "no crop": {"train.random_crop_padding": 0},
            "no mirroring": {"train.random_flip": False},
            "zoom": {"train.random_zoom": 0.2},
            "float32": {"train.precision": "float32"},
            "XLA": {"train.jit_compile": True},
        },
    ),
    # A Perceiver that reads pixels, to see whether the directions of the paper's ablations hold where it is small.
    "paper": Study(
        "cifar100",
        {
            "model.stem": "pixels",
            "model.resize_to": 16,
            "model.data_dim": None,
            "model.position_encoding": "fourier",
            "model.position_combination": "concat",
            "model.num_fourier_bands": 8,
            "model.num_latents": 32,
            "model.latent_dim": 64,
            "model.num_iterations": 4,
            "model.num_self_attention_blocks": 1,
            "model.num_cross_attention_heads": 1,
            "model.num_self_attention_heads": 4,
            "model.share_weights": True,
            "model.share_first_cross_attention": False,
            "train.optimizer": "lamb",
            "train.learning_rate": 8e-3,
            "train.weight_decay": 0.05,
            "train.global_batch_size": 128,
            "train.label_smoothing": 0.0,
            "train.cutmix": 0.0,
            "train.precision": "mixed_bfloat16",
        },
        {
            "learned positions": {"model.position_encoding": "learned"},
            # As wide as the Fourier features; those above are as wide as a pixel.
            "learned positions, 34 wide": {"model.position_encoding": "learned", "model.learned_position_dim": 34},
            "no positions": {"model.position_encoding": "none"},
            "iterations do not share": {"model.share_weights": False},
            "the first cross-attend shares too": {"model.share_first_cross_attention": True},
            "1 iteration": {"model.num_iterations": 1},
            "2 iterations": {"model.num_iterations": 2},
            "8 iterations": {"model.num_iterations": 8},
            "8 latents": {"model.num_latents": 8},
            "16 latents": {"model.num_latents": 16},
            "64 latents": {"model.num_latents": 64},
        },
    ),
    "digits": Study(
        "quickstart",
        {},
        {
            "2 x 2 patches": {"model.stem": "patches", "model.patch_size": 2},
            "pixels": {"model.stem": "pixels"},
            "16 latents": {"model.num_latents": 16},
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--archive", help="copy of cifar-100-python.tar.gz")
    parser.add_argument("--steps", type=int, default=600, help="steps of the base whose time is the budget")
    parser.add_argument("--equal", choices=("time", "steps"), default="time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants; default all")
    parser.add_argument("--record", type=Path, help="a line of JSON for each finished training, to go on from")
    parser.add_argument("--rounds", type=int, default=5, help="turns in which a step's time is measured")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at the same time")
    args = parser.parse_args()
    study = STUDIES[args.study]
    if unknown := set(args.only or ()) - set(study.variants):
        parser.error(f"--only {' '.join(sorted(unknown))}: the variants are {', '.join(study.variants)}")
    chosen: dict[str, Changes] = {BASE: {}} | {name: study.variants[name] for name in args.only or study.variants}
    configs = {name: configure(study, changes, args.archive) for name, changes in chosen.items()}
    budget = {"study": args.study, "steps": args.steps, "equal": args.equal}
    recorded = json_lines.read(args.record) if args.record and args.record.exists() else []
    done = [row for row in recorded if budget.items() <= row.items()]
    done = [row for row in done if row["settings"] == settings_of(configs.get(row["variant"]))]
    ratios = {BASE: 1.0} | {row["variant"]: row["relative_step_time"] for row in done}
    for name in configs.keys() - ratios.keys() if args.equal == "time" else ():
        ratios[name] = relative_step_time(configs[name], configs[BASE], args.rounds)
        print(f"{name}: {ratios[name]:.2f} times the base's step", file=sys.stderr, flush=True)
    runs = [(name, seed) for seed in args.seeds for name in configs]
    runs = [run for run in runs if run not in {(row["variant"], row["seed"]) for row in done}]

    def train(variant: str, seed: int) -> Changes:
        ratio = ratios.get(variant)
        steps = max(1, round(args.steps / ratio)) if ratio else args.steps
        contestant = Contestant(learn, configs[variant], steps, seed)
        try:
            metrics = contestant.wait()
        finally:
            contestant.end()
        run = {"variant": variant, "seed": seed, "relative_step_time": ratio, "steps_taken": steps}
        return budget | run | metrics | {"settings": settings_of(configs[variant])}

    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(train, *run) for run in runs]):
            row = future.result()
            done.append(row)
            if args.record:
                json_lines.add(args.record, row)
            print(f"{row['variant']}, seed {row['seed']}: {row['val_accuracy']:.4f}", file=sys.stderr, flush=True)
    shown = [row for row in done if row["variant"] in configs and row["seed"] in args.seeds]
    show(shown, args.steps, args.equal)
    print(json.dumps({"benchmark": "ablations", **budget, "runs": shown}))


def configure(study: Study, changes: Changes, archive: str | None) -> PipelineConfig:
    """The pipeline's settings with those of the study and of a variant."""
    config = PRESETS[study.preset]()
    sections: dict[str, Changes] = {"model": {}, "train": {}}
    for name, value in (study.base | changes).items():
        section, _, field = name.partition(".")
        sections[section][field] = value
    config = replace(
        config,
        model=replace(config.model, **sections["model"]),
        train=replace(config.train, num_workers=1, **sections["train"]),
    )
    if config.data.source != "cifar100":
        return config
    if archive is None:
        raise SystemExit("this study needs --archive")
    with open(archive, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(config, data=replace(config.data, archive=archive, sha256=sha256))


def settings_of(config: PipelineConfig | None) -> Changes | None:
    """What a training depends on, besides its steps and its seed; the place of the archive is no part of it.

    Nor is what only a training of several epochs looks at.
    """
    if config is None:
        return None
    data = {"source": config.data.source, "sha256": config.data.sha256, "seed": config.data.seed}
    unused = {"epochs", "seed", "warmup_epochs", "early_stopping_patience", "plateau_patience"}
    train = {name: value for name, value in keyed(config.train).items() if name not in unused}
    return json.loads(json.dumps({"data": data, "model": asdict(config.model), "train": train}))  # tuples become lists


def relative_step_time(config: PipelineConfig, base: PipelineConfig, rounds: int) -> float:
    """How long a training step takes, in steps of `base`: median over turns of the one and the other."""
    contestants = [Contestant(take_turns, config), Contestant(take_turns, base)]
    try:
        for contestant in contestants:
            contestant.wait()
        turns = [[contestant.turn() for contestant in contestants] for _ in range(rounds)]
    finally:
        for contestant in contestants:
            contestant.end()
    return statistics.median(own / other for own, other in turns)


def take_turns(answer: Answer, config: PipelineConfig) -> None:
    """Answers the seconds of a step, each turn."""
    model, train, _ = prepare(config, steps=1000, seed=0)
    # Not with `fit`: the end of an iterator of tf.data may take seconds.
    images, labels = next(iter(train))
    model.train_on_batch(images, labels)
    answer(None)
    while True:
        start = time.perf_counter()
        for _ in range(STEPS_A_TURN):
            model.train_on_batch(images, labels)
        answer((time.perf_counter() - start) / STEPS_A_TURN)


def learn(answer: Answer, config: PipelineConfig, steps: int, seed: int) -> None:
    """Trains for so many steps and answers the metrics on the validation rows."""
    model, train, validation = prepare(config, steps, seed)
    history = model.fit(train, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0).history
    metrics = model.evaluate(validation.images, validation.labels, batch_size=500, verbose=0, return_dict=True)
    answer(
        {f"val_{name}": float(value) for name, value in metrics.items()}
        | {"loss": float(history["loss"][-1])}
        | {"parameters": parameter_count(config.model), "mmacs": macs_per_image(config.model) / 1e6}
    )


def prepare(config: PipelineConfig, steps: int, seed: int) -> tuple[Any, Any, ImageArrays]:
    """A compiled model, its endless training batches, and the validation rows."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    from perceiver import Perceiver
    from pipeline.input_pipeline import training_dataset
    from pipeline.optimization import Accuracy, SmoothedCrossEntropy, TopKAccuracy, optimizer

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(config.train.precision)
    rows = load(config.data).train
    kept, held_out = stratified_split(rows.labels, config.data.validation_fraction, config.data.seed)
    train, validation = (ImageArrays(ids, rows.images[ids], rows.labels[ids]) for ids in (kept, held_out))
    pixels = train.images / np.float32(255)
    mean, std = (tuple(map(float, f((0, 1, 2), dtype=np.float64))) for f in (pixels.mean, pixels.std))
    # One epoch of so many steps: the cosine ends with them. A tenth of them warms up.
    settings = replace(config.train, epochs=1, warmup_epochs=0.1, seed=seed)
    model = Perceiver(**asdict(replace(config.model, pixel_mean=mean, pixel_std=std)))
    model.build()
    model.compile(
        optimizer(settings, model, steps),
        SmoothedCrossEntropy(settings.label_smoothing),
        metrics=[Accuracy(name="accuracy"), TopKAccuracy(5, name="top5_accuracy")],
        jit_compile=config.train.jit_compile,
    )
    return model, training_dataset(train, settings, config.model.num_classes), validation


def show(runs: list[Changes], steps: int, equal: str) -> None:
    """A row a variant, the best first: means over the seeds, and the range of the top-1 accuracy."""
    columns = ("variant", "parameters", "MMAC", "time a step", "steps", "seeds", "top-1", "lowest to highest")
    table = Table(
        *columns, "top-5", "loss", title=f"Budget: {steps:,} steps of the base, equal {equal}; validation rows"
    )
    by_variant: dict[str, list[Changes]] = {}
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
    main()
