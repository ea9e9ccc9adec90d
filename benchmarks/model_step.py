"""Speed of a training step of the Perceiver, compared with the published Keras example and with the machine's peak.

    python benchmarks/model_step.py [--models ...] [--precisions ...] [--compilers ...] [--rounds N] [--profile MODEL]
    python benchmarks/model_step.py --peers --cache FOLDER [--precisions mixed_bfloat16] [--cores 0 1]

All models take turns of one step in one process (A B C D A B C D ...), so that a change in the load of the machine
affects all alike. The results are medians over the turns. The same turns include bare matrix products: the product of
two large matrices gives the peak of the machine, and the products of each model, forward and backward at their own
shapes, give the speed that the model would reach if only its products took time. Data feeding and augmentation are
excluded, except the augmentation of the published example, which is part of its model.

With `--peers` it compares instead a step of `cifar100` with that of the same model in PyTorch and JAX, and with Muon;
step_turns.py says how.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from ending import run_benchmark
from matrix_products import product_shapes, products
from published_example import PUBLISHED_MACS, published
from step_profile import print_profile
from step_turns import PACKAGES, compare_steps

from perceiver import Perceiver, presets
from perceiver.cost import macs_per_image
from pipeline.devices import cpu_name

PUBLISHED = "published"
MODELS = (PUBLISHED, "keras_example", "keras_example_fixed", "cifar100")
DTYPES = {"float32": "float32", "mixed_bfloat16": "bfloat16"}
"""Of the products that a step is compared with, by its precision."""


@dataclass(frozen=True)
class Speed:
    """Speed of a step at one precision."""

    model: str
    """Name of a model, or "peak" for the product of two large matrices."""
    precision: str
    compiler: str
    """"plain", "xla", or "products" for the matrix products of the model alone."""
    seconds: float
    """Median duration of a step."""
    fastest_seconds: float
    images_per_second: float
    gflop_per_image: float

    @property
    def gflop_per_second(self) -> float:
        return self.gflop_per_image * self.images_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--compilers", nargs="+", default=["plain", "xla"], choices=["plain", "xla"])
    parser.add_argument("--batch-size", type=int, default=8, help="images per step; cifar100 takes 16 times as many")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model")
    parser.add_argument(
        "--peak-side", type=int, default=4096, help="side of the square matrices whose product gives the peak"
    )
    parser.add_argument("--profile", choices=MODELS, help="print instead how a step of this model spends its time")
    peers = [name for name in PACKAGES if name != "keras"]
    parser.add_argument("--peers", nargs="*", choices=peers, help="compare with these instead; without names, with all")
    parser.add_argument("--cache", type=Path, help="folder for the environments of the peers, which is kept")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)), help="of the peers")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn of the peers")
    args = parser.parse_args()
    if args.peers is not None:
        if args.cache is None:
            parser.error("--peers needs --cache FOLDER")
        found = compare_steps(
            args.peers or peers,
            args.cache,
            args.precisions,
            preset="cifar100",
            batch=step_size("cifar100", args.batch_size),
            rounds=args.rounds,
            steps=args.steps,
            cores=args.cores,
        )
        print(json.dumps({"benchmark": "model_step", "processor": cpu_name(), "cores": len(args.cores)} | found))
        return
    if args.profile:
        for precision in args.precisions:
            size = step_size(args.profile, args.batch_size)
            print(f"{args.profile}, {precision}, plain, batch {size}: share of the time of all operations")
            print_profile(training_step(args.profile, precision, False, size))
        return
    speeds: list[Speed] = []
    for precision in args.precisions:
        speeds += measure(args.models, precision, args.compilers, args.batch_size, args.rounds, args.peak_side)
    print_table(speeds)
    print(json.dumps([asdict(speed) for speed in speeds]))


def measure(
    models: Sequence[str], precision: str, compilers: Sequence[str], batch_size: int, rounds: int, side: int
) -> list[Speed]:
    """Measures all models at one precision in turns; the first result is the peak of the machine."""
    dtype = DTYPES[precision]
    steps: dict[tuple[str, str], Callable[[], object]] = {("peak", ""): products([(1, side, side, side)], dtype)}
    sizes = {name: step_size(name, batch_size) for name in models}
    for name in models:
        for compiler in compilers:
            if compiler == "xla" and name == PUBLISHED:
                print(f"{name}, XLA: left out, its augmentation cannot be compiled: Keras would run it plain")
                continue
            steps[name, compiler] = training_step(name, precision, compiler == "xla", sizes[name])
        if name != PUBLISHED:
            steps[name, "products"] = products(product_shapes(getattr(presets, name)(), sizes[name]), dtype)
    for step in steps.values():
        step()  # the first call traces and compiles
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[key].append(time.perf_counter() - start)
    speeds = []
    for (name, compiler), times in seconds.items():
        if name == "peak":
            flops, images = 2.0 * side**3, 1
        else:
            images = sizes[name]
            flops = 6.0 * images * (PUBLISHED_MACS if name == PUBLISHED else macs_per_image(getattr(presets, name)()))
        median = statistics.median(times)
        speeds.append(
            Speed(name, precision, compiler, median, min(times), images / median, gflop_per_image=flops / images / 1e9)
        )
    return speeds


def step_size(name: str, batch_size: int) -> int:
    """Images per step of a model, for the `--batch-size` of the command line."""
    return batch_size * (16 if name == "cifar100" else 1)


def training_step(name: str, precision: str, jit_compile: bool, batch_size: int) -> Callable[[], object]:
    """A function that runs a training step with Adam on one batch, as `fit` would."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 100, batch_size, dtype=np.int32)
    if name == PUBLISHED:
        model = published()
        images = images.astype(np.float32)  # the example feeds float32
    else:
        model = Perceiver(**asdict(getattr(presets, name)()))
        model.build()
    # No top-k accuracy, because it does not accept the bfloat16 logits of the published example.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], jit_compile=jit_compile)
    keras.config.set_dtype_policy("float32")
    return lambda: model.train_on_batch(images, labels)


def print_table(speeds: Sequence[Speed]) -> None:
    """Prints the speed of each model, as a share of the peak and of its own products, and relative to the example.

    The ratio to the example compares the faster of plain and XLA of each, at the same precision.
    """
    head = f"{'model':20} {'precision':15} {'':9} {'images/s':>9} {'GFLOP/image':>12} {'GFLOP/s':>8} {'of peak':>8}"
    print(f"{head} {'of products':>12} {'x published':>12}")
    for speed in speeds:
        same = [other for other in speeds if other.precision == speed.precision]
        peak = next(other for other in same if other.model == "peak")
        own = [other for other in same if other.model == speed.model and other.compiler == "products"]
        steps = [other for other in same if other.model == speed.model and other.compiler in ("plain", "xla")]
        example = [other.images_per_second for other in same if other.model == PUBLISHED]
        share = f"{speed.gflop_per_second / own[0].gflop_per_second:.0%}" if own and speed in steps else ""
        is_best = speed in steps and speed.seconds == min(step.seconds for step in steps)
        ratio = f"{speed.images_per_second / max(example):.2f}" if example and is_best else ""
        print(
            f"{speed.model:20} {speed.precision:15} {speed.compiler:9} {speed.images_per_second:9.2f} "
            f"{speed.gflop_per_image:12.3f} {speed.gflop_per_second:8.1f} "
            f"{speed.gflop_per_second / peak.gflop_per_second:8.0%} {share:>12} {ratio:>12}"
        )


if __name__ == "__main__":
    run_benchmark(main)
