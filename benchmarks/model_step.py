"""How fast a training step of the Perceiver is, against the published Keras example and against the machine.

    python benchmarks/model_step.py [--models ...] [--precisions ...] [--compilers ...] [--rounds N] [--profile MODEL]

All models take turns, one step each, in one process (A B C D A B C D ...), so that whatever else the machine does hits
them alike; figures are medians over the turns. Beside them, in the same turns, run bare matrix products: large ones,
for the machine's peak, and those of each model at their own shapes, forward and backward, for what the model could
reach if nothing but its products took time. Data feeding and augmentation are left out, but for the published
example's, which is part of its model.
"""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from published_example import PublishedPerceiver, create_data_augmentation

from perceiver import Perceiver, PerceiverConfig, presets
from perceiver.cost import macs_per_image

PUBLISHED = "published"
MODELS = (PUBLISHED, "keras_example", "keras_example_fixed", "cifar100")
# Multiply-accumulates of the example as it is: keys and values are computed in each of its two iterations.
PUBLISHED_MACS = macs_per_image(presets.keras_example()) + 1024 * 256 * (256 + 256)


@dataclass(frozen=True)
class Speed:
    """How fast something was at one precision."""

    model: str
    """A model, or "peak" for the product of two large matrices."""
    precision: str
    compiler: str
    """"plain" or "xla"; "products" for the model's matrix products alone."""
    seconds: float
    """Median of a step."""
    fastest_seconds: float
    images_per_second: float
    gflop_per_image: float

    @property
    def gflop_per_second(self) -> float:
        return self.gflop_per_image * self.images_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--compilers", nargs="+", default=["plain", "xla"], choices=["plain", "xla"])
    parser.add_argument("--batch-size", type=int, default=8, help="images of a step; cifar100 takes 16 times as many")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every model")
    parser.add_argument("--peak-side", type=int, default=4096, help="of the square matrices whose product is the peak")
    parser.add_argument("--profile", choices=MODELS, help="say what the steps of this model go into instead")
    args = parser.parse_args()
    if args.profile:
        for precision in args.precisions:
            print_profile(args.profile, precision, args.batch_size)
        return
    speeds: list[Speed] = []
    for precision in args.precisions:
        speeds += measure(args.models, precision, args.compilers, args.batch_size, args.rounds, args.peak_side)
    print_table(speeds)
    print(json.dumps([asdict(speed) for speed in speeds]))


def measure(
    models: Sequence[str], precision: str, compilers: Sequence[str], batch_size: int, rounds: int, side: int
) -> list[Speed]:
    """Everything at one precision, in turns; the peak comes first."""
    dtype = "bfloat16" if precision == "mixed_bfloat16" else "float32"
    steps: dict[tuple[str, str], Callable[[], object]] = {("peak", ""): products([(1, side, side, side)], dtype)}
    sizes = {name: batch_size * (16 if name == "cifar100" else 1) for name in models}
    for name in models:
        for compiler in compilers:
            if compiler == "xla" and name == PUBLISHED:
                print(f"{name}, XLA: left out, its augmentation cannot be compiled: Keras would run it plain")
                continue
            steps[name, compiler] = training_step(name, precision, compiler == "xla", sizes[name])
        if name != PUBLISHED:
            steps[name, "products"] = products(product_shapes(getattr(presets, name)(), sizes[name]), dtype)
    for step in steps.values():
        step()  # traced and compiled here
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


def training_step(name: str, precision: str, jit_compile: bool, batch_size: int) -> Callable[[], object]:
    """A step of Adam on one batch, with what `fit` would run; returns the loss."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 100, batch_size, dtype=np.int32)
    if name == PUBLISHED:
        model = published()
        images = images.astype(np.float32)  # as its own data
    else:
        model = Perceiver(**asdict(getattr(presets, name)()))
        model.build()
    # No top-k accuracy: it does not take the bfloat16 logits of the published example.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], jit_compile=jit_compile)
    keras.config.set_dtype_policy("float32")
    return lambda: model.train_on_batch(images, labels)


def published() -> keras.Model:
    """The published example at its own settings."""
    augmentation = create_data_augmentation([129.3, 124.1, 112.4], [4646.9, 4277.2, 4959.0], 64)
    augmentation.build((None, 32, 32, 3))  # within the step its constants would belong to another graph
    return PublishedPerceiver(
        patch_size=2,
        data_dim=1024,
        latent_dim=256,
        projection_dim=256,
        num_heads=8,
        num_transformer_blocks=4,
        ffn_units=[256, 256],
        dropout_rate=0.2,
        num_iterations=2,
        classifier_units=[256, 100],
        data_augmentation=augmentation,
    )


def product_shapes(config: PerceiverConfig, batch_size: int) -> list[tuple[int, int, int, int]]:
    """(count, m, k, n) of the products (m, k) x (k, n) in a forward pass; count > 1: independent ones, as of heads.

    Convolutions count as the product that they are of patches and filters.
    """
    c, b = config, batch_size
    n, d, m, width = c.num_latents, c.latent_dim, c.num_inputs, c.data_width
    shapes = []
    if c.stem == "conv":
        channels = [c.image_shape[2], *[c.conv_channels] * (c.num_conv_layers - 1), c.projected_dim]
        height, columns = c.resized_shape
        for layer in range(c.num_conv_layers):
            shapes.append((1, b * height * columns // 4**layer, 9 * channels[layer], channels[layer + 1]))
    elif c.data_dim is not None:
        patch = c.patch_size**2 if c.stem == "patches" else 1
        shapes.append((1, b * m, c.image_shape[2] * patch, c.data_dim))
    for _ in set(c.cross_attend_order):
        shapes += [(1, b * m, width, c.cross_qk_dim), (1, b * m, width, c.cross_v_dim)]

    def attend(inputs: int, heads: int, qk_dim: int, v_dim: int, widening_factor: int, images: int) -> None:
        shapes.append((1, images * n, d, qk_dim))
        shapes.append((b * heads, n, qk_dim // heads, inputs))
        shapes.append((b * heads, n, inputs, v_dim // heads))
        if c.cross_attention_output_projection or inputs == n:
            shapes.append((1, b * n, v_dim, d))
        shapes.append((1, b * n, d, widening_factor * d))
        shapes.append((1, b * n, widening_factor * d, d))

    for iteration in range(c.num_iterations):
        # The first queries are the same for all images.
        attend(
            m,
            c.num_cross_attention_heads,
            c.cross_qk_dim,
            c.cross_v_dim,
            c.cross_attention_widening_factor,
            images=1 if iteration == 0 else b,
        )
        for _ in range(c.num_self_attention_repeats * c.num_self_attention_blocks):
            attend(n, c.num_self_attention_heads, c.self_qk_dim, c.self_v_dim, c.self_attention_widening_factor, b)
            shapes += [(1, b * n, d, c.self_qk_dim), (1, b * n, d, c.self_v_dim)]
    return shapes


def products(shapes: Sequence[tuple[int, int, int, int]], dtype: str) -> Callable[[], object]:
    """Runs the products of `shapes`; where there is more than one shape, also both products of their gradients."""
    distinct = Counter(shapes)
    arrays = {
        shape: (
            tf.cast(tf.random.normal((shape[0], shape[1], shape[2])), dtype),
            tf.cast(tf.random.normal((shape[0], shape[2], shape[3])), dtype),
            tf.cast(tf.random.normal((shape[0], shape[1], shape[3])), dtype),
        )
        for shape in distinct
    }

    def flat(x: tf.Tensor) -> tf.Tensor:
        return x[0] if x.shape[0] == 1 else x

    # One function a product, so that none is taken for another's equal and left out.
    @tf.function(autograph=False)
    def product(a: tf.Tensor, b: tf.Tensor, of_first: bool, of_second: bool) -> tf.Tensor:
        return tf.matmul(a, b, transpose_a=of_first, transpose_b=of_second)

    def run() -> None:
        for shape, count in distinct.items():
            a, b, c = map(flat, arrays[shape])
            for _ in range(count):
                product(a, b, False, False)
                if len(distinct) > 1:
                    product(c, b, False, True)
                    product(a, c, True, False)

    return run


def print_table(speeds: Sequence[Speed]) -> None:
    """Each model's figures, its share of the peak and of its own products' speed, and the ratio to the example.

    The ratio is that of the best of both: the faster of plain and XLA at the same precision.
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


# What an operation is for, by its name in the graph, the first that fits; names of gradients hold the forward scope.
KINDS = (
    ("products", ("MatMul", "Conv2D")),
    ("softmax", ("Softmax",)),
    ("transposes", ("Transpose",)),
    ("random numbers", ("RandomUniform",)),
    ("casts", ("Cast",)),
    ("bias", ("BiasAdd",)),
)
SCOPES = (
    ("LayerNorm", "norm"),
    ("dropout", "dropout"),
    ("attention weights, less products and softmax", "attention"),
    ("GELU", "mlp"),
    ("optimizer", "adam"),
    ("stem", "stem"),
)


def print_profile(model: str, precision: str, batch_size: int) -> None:
    """What the time of TensorFlow's operations in a plain step goes into, from its profiler's trace of three steps."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    step = training_step(model, precision, False, batch_size * (16 if model == "cifar100" else 1))
    for _ in range(2):
        step()
    with TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(3):
            step()
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    spent: Counter[str] = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                operation, _, kind = name.rpartition(":")
                if operation and "::" not in name and "Execute" not in name:  # else it is a part of TensorFlow itself
                    spent[_purpose(operation.lower(), kind)] += event.duration_ps
    total = sum(spent.values())
    print(f"{model}, {precision}, plain, batch {batch_size}: share of the time of all operations")
    for purpose, duration in spent.most_common():
        print(f"{duration / total:6.1%}  {purpose}")


def _purpose(operation: str, kind: str) -> str:
    for purpose, kinds in KINDS:
        if any(part in kind for part in kinds):
            return purpose
    return next((purpose for purpose, scope in SCOPES if scope in operation), "other")


if __name__ == "__main__":
    main()
