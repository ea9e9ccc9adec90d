"""Which shape of the Perceiver learns most in a given time on one core?

    python benchmarks/shapes.py cifar100 --archive cifar-100-python.tar.gz --seconds 240
    python benchmarks/shapes.py quickstart --seconds 15 --seeds 0 1 2

Every shape is the preset with some fields changed. Its time for a training step is measured first, all shapes in turns,
one thread; the seconds over that time are the steps that it gets, with the preset's recipe and the whole cosine in
them. So every shape has the same budget of undisturbed time, and what else the machine does while they train changes
nothing. Judged on the validation rows; the test rows are not read.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant

from perceiver.cost import macs_per_image, parameter_count
from pipeline.batches import ImageArrays, train_batches
from pipeline.config import PRESETS, PipelineConfig
from pipeline.datasets import load
from pipeline.preprocess import stratified_split

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "cifar100": {
        "as it is": {},
        "64 latents": {"num_latents": 64},
        "4 iterations of 1 block": {"num_iterations": 4, "num_self_attention_blocks": 1},
        "1 iteration of 4 blocks": {"num_iterations": 1, "num_self_attention_blocks": 4},
        "32 channels in the stem": {"conv_channels": 32},
        "4 x 4 patches": {"stem": "patches"},
    },
    "quickstart": {
        "as it is": {},
        "2 x 2 patches": {"stem": "patches", "patch_size": 2},
        "pixels": {"stem": "pixels"},
        "16 latents": {"num_latents": 16},
    },
}
STEPS_A_TURN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=SHAPES)
    parser.add_argument("--archive", help="copy of cifar-100-python.tar.gz, for cifar100")
    parser.add_argument("--seconds", type=float, default=240.0, help="training time of each shape on a quiet core")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns in which a step's time is measured")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at the same time")
    args = parser.parse_args()
    config = PRESETS[args.preset]()
    if args.preset == "cifar100":
        if args.archive is None:
            parser.error("cifar100 needs --archive")
        with open(args.archive, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        config = replace(config, data=replace(config.data, archive=args.archive, sha256=sha256))
    shapes = {
        name: replace(config, model=replace(config.model, **fields)) for name, fields in SHAPES[args.preset].items()
    }
    step_times = measure(shapes, args.rounds)

    def train(shape: str, seed: int) -> dict[str, Any]:
        steps = round(args.seconds / step_times[shape])
        contestant = Contestant(learn, shapes[shape], steps, seed)
        try:
            metrics = contestant.wait()
        finally:
            contestant.end()
        print(f"{shape}, seed {seed}: {metrics['val_accuracy']:.4f}", file=sys.stderr, flush=True)
        return {"shape": shape, "seed": seed, "step_ms": 1e3 * step_times[shape], "steps": steps, **metrics}

    runs = [(shape, seed) for shape in shapes for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda run: train(*run), runs))
    show(rows, args.seconds)
    print(json.dumps({"benchmark": "shapes", "settings": vars(args), "runs": rows}))


def measure(shapes: dict[str, PipelineConfig], rounds: int) -> dict[str, float]:
    """Median seconds of a step of every shape, in turns."""
    contestants: list[Contestant] = []
    try:
        for config in shapes.values():
            contestants.append(Contestant(take_turns, config))
            contestants[-1].wait()
        turns = [[contestant.turn() for contestant in contestants] for _ in range(rounds)]
    finally:
        for contestant in contestants:
            contestant.end()
    return {shape: statistics.median(turn[i] for turn in turns) for i, shape in enumerate(shapes)}


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
    model.fit(train, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0)
    metrics = model.evaluate(validation.images, validation.labels, batch_size=500, verbose=0, return_dict=True)
    answer(
        {f"val_{name}": float(value) for name, value in metrics.items()}
        | {"parameters": parameter_count(config.model), "mmacs": macs_per_image(config.model) / 1e6}
    )


def prepare(config: PipelineConfig, steps: int, seed: int) -> tuple[Any, Any, ImageArrays]:
    """A compiled model, its endless training batches, and the validation rows."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    from perceiver import Perceiver
    from pipeline.optimization import SmoothedCrossEntropy, optimizer

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(seed)
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
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(k=5, name="top5_accuracy")],
        jit_compile=False,
    )
    size = settings.global_batch_size
    signature = (tf.TensorSpec((size, *train.images.shape[1:]), tf.uint8), tf.TensorSpec((size,), tf.int32))
    batches = tf.data.Dataset.from_generator(
        lambda: train_batches(train, settings, rank=0, num_workers=1), output_signature=signature
    )
    return model, batches.prefetch(4), validation


def show(runs: list[dict[str, Any]], seconds: float) -> None:
    """A row a shape, the best first: means over the seeds, and the range of the top-1 accuracy."""
    columns = ("shape", "parameters", "MMAC", "ms a step", "steps", "top-1", "lowest to highest", "top-5", "loss")
    table = Table(*columns, title=f"{seconds:.0f} s of one core each, validation rows")
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_shape.setdefault(run["shape"], []).append(run)

    def mean(name: str, shape: str) -> float:
        return statistics.mean(run[name] for run in by_shape[shape])

    for shape in sorted(by_shape, key=lambda shape: -mean("val_accuracy", shape)):
        first, accuracies = by_shape[shape][0], [run["val_accuracy"] for run in by_shape[shape]]
        table.add_row(
            shape,
            f"{first['parameters']:,}",
            f"{first['mmacs']:.1f}",
            f"{first['step_ms']:.1f}",
            f"{first['steps']:,}",
            f"{mean('val_accuracy', shape):.2%}",
            f"{min(accuracies):.2%} to {max(accuracies):.2%}",
            f"{mean('val_top5_accuracy', shape):.2%}",
            f"{mean('val_loss', shape):.3f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
