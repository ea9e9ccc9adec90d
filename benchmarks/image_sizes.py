"""Speed of a training step of a preset, fitted to images of several sizes.

    python benchmarks/image_sizes.py [--preset cifar100] [--sides 32 64 128 224] [--num-classes 100] [--rounds N]

The model of each size is what `perceiver.presets.for_images` makes of the preset; optimizer, loss and precision are
those of the preset. All sizes take turns of one step in one process on all of its cores, so that a change in the load
of the machine affects all alike. The results are medians over the turns, and the fastest turn, which other work on the
machine affects least. Data feeding and augmentation are excluded. It takes about a minute on two cores.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from ending import run_benchmark
from rich.console import Console
from rich.table import Table

from perceiver import Perceiver, PerceiverConfig
from perceiver.cost import macs_per_image, parameter_count
from perceiver.presets import for_images
from pipeline.settings.presets import PRESETS
from pipeline.training.config import TrainingConfig
from pipeline.training.optimization import SmoothedCrossEntropy, optimizer

COLUMNS = ("pixels", "tokens", "channels", "parameters", "MMAC an image", "images/s", "fastest", "10,000 images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar100", choices=PRESETS)
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 64, 128, 224], help="pixels of a side")
    parser.add_argument("--channels", type=int, default=3, help="1 for grey images")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each size")
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    models = {
        side: for_images(preset.model, (side, side, args.channels), args.num_classes) for side in sorted(args.sides)
    }
    steps = {side: training_step(model, preset.train, args.batch_size) for side, model in models.items()}
    for step in steps.values():
        step()  # the first call traces
    seconds: dict[int, list[float]] = {side: [] for side in steps}
    for _ in range(args.rounds):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
    rows = [row(model, [args.batch_size / second for second in seconds[side]]) for side, model in models.items()]
    show(rows, f"{args.preset}, {args.num_classes} classes, {preset.train.precision}, batch {args.batch_size}")
    print(json.dumps({"benchmark": "image_sizes", "preset": args.preset, "rows": rows}))


def training_step(config: PerceiverConfig, train: TrainingConfig, batch_size: int) -> Callable[[], object]:
    """A function that runs a training step on one batch of noise."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(train.precision)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, *config.image_shape), dtype=np.uint8)
    labels = rng.integers(0, config.num_classes, batch_size, dtype=np.int32)
    model = Perceiver(**asdict(config))
    model.build()
    model.compile(optimizer(train, model, 100), SmoothedCrossEntropy(train.label_smoothing))
    return lambda: model.train_on_batch(images, labels)


def row(model: PerceiverConfig, images_per_second: list[float]) -> dict[str, Any]:
    """Size and cost of a model, and its speed in each turn."""
    return {
        "side": model.image_shape[0],
        "tokens": model.num_inputs,
        "channels": model.conv_widths if model.stem == "conv" else model.image_shape[2:],
        "parameters": parameter_count(model),
        "mmacs": macs_per_image(model) / 1e6,
        "images_per_second": statistics.median(images_per_second),
        "fastest": max(images_per_second),
    }


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(*COLUMNS, title=title)
    for found in rows:
        table.add_row(
            str(found["side"]),
            str(found["tokens"]),
            " ".join(map(str, found["channels"])),
            f"{found['parameters']:,}",
            f"{found['mmacs']:.1f}",
            f"{found['images_per_second']:.1f}",
            f"{found['fastest']:.1f}",
            f"{10_000 / found['images_per_second']:.0f} s",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    run_benchmark(main)
