"""Accuracy that the published Keras example reaches in an hour of training.

    python benchmarks/published_training.py --archive cifar-100-python.tar.gz --record benchmarks/data/accuracy.jsonl

The example is trained with its own sizes, optimizer, batch size and augmentation, in one process on all cores, as its
`fit` would train it. The training time counts only its steps, including the first, which traces the model. The
validation that gives the curve is excluded. All 10,000 test images are evaluated once, at the end. The run is appended
to the record of accuracy.py, whose table and figure compare it with the presets.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_lines
import keras
import numpy as np
from accuracy import archive_arguments
from ending import existing_file, run_benchmark
from published_example import PUBLISHED_MACS, published

from pipeline.data.ingest import load
from pipeline.data.rows import stratified_split
from pipeline.settings.command_line import parse

BATCH_SIZE, LEARNING_RATE = 64, 1e-3  # those of the example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=existing_file, required=True, help="copy of cifar-100-python.tar.gz")
    parser.add_argument("--record", type=Path, help="JSON lines file to which the run is appended")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--points", type=int, default=6, help="points of the curve")
    parser.add_argument("--validation-rows", type=int, default=500, help="validation rows of each point")
    parser.add_argument("--test-rows", type=int, help="test rows; default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.record:
        json_lines.begin(args.record)
    keras.utils.set_random_seed(args.seed)
    data = parse(["keras_example", *archive_arguments(args.archive)])[1].config.data
    rows = load(data)
    kept, held_out = stratified_split(rows.train.labels, data.validation_fraction, data.seed)
    held_out = np.random.default_rng(args.seed).permutation(held_out)[: args.validation_rows]
    model = published()
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(5, name="top5_accuracy"),
        ],
    )

    def evaluate(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return model.evaluate(images, labels, batch_size=BATCH_SIZE, verbose=0, return_dict=True)

    seconds, images, losses, curve = 0.0, 0, [], []
    batches = shuffled(kept, args.seed)
    for point in range(1, args.points + 1):
        while seconds < 60 * args.minutes * point / args.points:
            start = time.perf_counter()
            ids = next(batches)
            step = model.train_on_batch(rows.train.images[ids], rows.train.labels[ids], return_dict=True)
            losses.append(float(step["loss"]))
            seconds += time.perf_counter() - start
            images += len(ids)
        found = evaluate(rows.train.images[held_out], rows.train.labels[held_out])
        curve.append(
            {"seconds": seconds, "loss": losses[-1], "images_per_second": images / seconds}
            | {f"val_{name}": value for name, value in found.items()}
        )
        print(f"{seconds:.0f} s, {images:,} images: {found}", file=sys.stderr, flush=True)
        model.reset_metrics()
    test = evaluate(rows.test.images[: args.test_rows], rows.test.labels[: args.test_rows])
    row: dict[str, Any] = {
        "name": "published example",
        "seed": args.seed,
        "settings": {"batch_size": BATCH_SIZE, "minutes": args.minutes},
        "test": {"top1": test["accuracy"], "top5": test["top5_accuracy"], "loss": test["loss"]}
        | {"num_examples": len(rows.test.labels[: args.test_rows])},
        "training_seconds": seconds,
        "epochs": images / len(kept),
        "parameters": model.count_params(),
        "mmacs": PUBLISHED_MACS / 1e6,
        "pflop": 6 * PUBLISHED_MACS * images / 1e15,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "curve": curve,
    }
    if args.record:
        json_lines.add(args.record, row)
    print(json.dumps({"benchmark": "published_training"} | row))


def shuffled(ids: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Batches of row ids, epoch after epoch without end, in a new order each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(ids)
        yield from (order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE))


if __name__ == "__main__":
    run_benchmark(main)
