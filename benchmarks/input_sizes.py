"""Time and memory of a training step on images of several sizes: a Perceiver's O(M N) beside O(M^2) and convolutions.

    python benchmarks/input_sizes.py [--sides 32 64 128 224] [--models ...] [--rounds 5]

Each model keeps its weights' shapes at all sizes (the learned positions of the ViT apart): nothing is fitted to the
image, unlike in image_sizes.py, which measures the pipeline's rule. The Perceivers have N = 16 latents and Fourier
positions, so that their number of weights does not depend on the M rows that they read. A step has about as many pixels
at every size, `--pixels`. Precision is mixed_bfloat16, the optimizer AdamW, the images noise.

Each model is measured in a process of its own, from the smallest images to the largest. Memory is what the backward
pass reads of the forward pass, for an image, counted in TensorFlow's graph of the step; weights and temporary buffers
are not part of it. The last columns compare work and time of an image with those of the smallest: O(M) gives the ratio
of the pixels, O(M^2) its square. It takes about 5 minutes on 2 cores.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from ending import run_benchmark
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant

from pipeline.devices import cpu_name

# Without what depends on the number of rows, such as learned positions and a prior over the grid.
SMALL: dict[str, Any] = {
    "position_encoding": "fourier",
    "num_latents": 16,
    "num_cross_attention_heads": 4,
    "cross_attention_prior": False,
    "share_weights": True,
    "num_conv_residuals": 0,
    "data_dim": 128,
}
CONCATENATED: dict[str, Any] = SMALL | {"position_combination": "concat"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Perceiver, stem": ("perceiver", SMALL),
    "Perceiver, 4 x 4 patches": ("perceiver", CONCATENATED | {"stem": "patches", "data_dim": 126}),
    "Perceiver, pixels": ("perceiver", CONCATENATED | {"stem": "pixels", "data_dim": 62}),
    "CNN": ("cnn", {}),
    "ViT, 4 x 4 patches": ("vit", {"blocks": 5}),
}
"""Builder of comparison_models.py and its arguments, by name in the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 64, 128, 224], help="pixels of a side")
    parser.add_argument("--pixels", type=int, default=65_536, help="of a step: 64 images of 32 x 32")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed, after one that traces")
    parser.add_argument("--num-classes", type=int, default=100)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        contestant = Contestant(measure, *MODELS[name], sorted(args.sides), args.pixels, args.rounds, args.num_classes)
        try:
            rows += [{"model": name} | row for row in contestant.wait()]
        finally:
            contestant.end()
    show(rows)
    print(json.dumps({"benchmark": "input_sizes", "processor": cpu_name(), "cores": os.cpu_count(), "rows": rows}))


def measure(
    answer: Answer,
    builder: str,
    arguments: dict[str, Any],
    sides: Sequence[int],
    pixels: int,
    rounds: int,
    num_classes: int,
) -> None:
    """Case of a `Contestant`: answers a row for each side."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import numpy as np
    from comparison_models import BUILDERS

    from pipeline.training.macs import count_macs

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    rng = np.random.default_rng(0)
    rows = []
    for side in sides:
        batch = max(1, round(pixels / side**2))
        model = BUILDERS[builder]((side, side, 3), num_classes, **arguments)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(1e-3), loss)
        images = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        labels = rng.integers(0, num_classes, batch, dtype=np.int32)
        macs = count_macs(model, (side, side, 3))
        assert macs is not None, f"the graph of {builder} does not tell its multiply-accumulates"
        model.train_on_batch(images, labels)  # traces
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            model.train_on_batch(images, labels)
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "side": side,
                "batch": batch,
                "parameters": model.count_params(),
                "mmacs": macs / 1e6,
                "milliseconds_an_image": 1e3 * statistics.median(seconds) / batch,
                "fastest": 1e3 * min(seconds) / batch,
                "mib_an_image": kept_bytes(model, (side, side, 3)) / 2**20,
            }
        )
        del model
    answer(rows)


def kept_bytes(model: Any, image_shape: tuple[int, int, int]) -> float:
    """Bytes an image of the tensors that the forward pass of a training step computes and the backward pass reads."""
    import tensorflow as tf

    batch = 11  # a size that no first dimension of a weight has
    forward_operations = []

    @tf.function(autograph=False)
    def step(images: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images, training=True))
        forward_operations.append(len(tf.compat.v1.get_default_graph().get_operations()))
        return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    operations = step.get_concrete_function(tf.TensorSpec((batch, *image_shape), tf.uint8)).graph.get_operations()
    forward = set(operations[: forward_operations[-1]])
    kept: dict[Any, int] = {}
    for operation in operations[len(forward) :]:
        for read in operation.inputs:
            tensor = read
            while tensor.op.type in ("Reshape", "Identity", "IdentityN", "ExpandDims", "Squeeze"):  # no copies
                tensor = tensor.op.inputs[0]
            if tensor.op in forward and tensor.dtype.is_floating and tensor.shape[:1] == (batch,):
                kept[tensor.ref()] = tensor.shape.num_elements() * tensor.dtype.size
    return sum(kept.values()) / batch


def show(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("model", "pixels", "parameters", "MMAC", "batch", "ms", "fastest", "MiB", "x MMAC", "x ms")
    table = Table(*columns, title="for each image; the last two beside the smallest images")
    for row in rows:
        smallest = next(each for each in rows if each["model"] == row["model"])
        table.add_row(
            row["model"],
            str(row["side"]),
            f"{row['parameters']:,}",
            f"{row['mmacs']:.1f}",
            str(row["batch"]),
            f"{row['milliseconds_an_image']:.2f}",
            f"{row['fastest']:.2f}",
            f"{row['mib_an_image']:.1f}",
            *(f"{row[name] / smallest[name]:.1f}" for name in ("mmacs", "milliseconds_an_image")),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    run_benchmark(main)
