"""Ways to sum gradients over workers: one tensor at a time, as a list, packed into a vector, and packed in bfloat16.

    python benchmarks/all_reduce.py

Two processes on one machine, with one thread each, sum tensors with the shapes of a preset's weights, as
MultiWorkerMirroredStrategy sums gradients. A turn is `--steps` consecutive sums. The ways take turns, and the time is
that of the slower process. `MB` is the size of the tensors that a worker contributes. The time includes the casts.
`agrees` is the largest difference from the sum in float64, relative to the largest sum.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ending import run_benchmark
from local_workers import free_addresses, join_cluster
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant, medians

from perceiver import presets

WAYS = ("one by one", "list", "packed", "packed bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets", nargs="+", default=["cifar100", "keras_example"], help="presets of perceiver/presets.py"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way")
    parser.add_argument("--steps", type=int, default=10, help="sums in a turn")
    args = parser.parse_args()
    rows = [row for preset in args.presets for row in compare(preset, args.rounds, args.steps)]
    table = Table("preset", "tensors", "way", "MB", "ms", "range", "agrees", title="Sum over two workers")
    for row in rows:
        low, high = row["range"]
        table.add_row(
            row["preset"],
            str(row["tensors"]),
            row["way"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['agrees']:.0e}",
        )
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "all_reduce", "settings": vars(args), "rows": rows}))


def compare(preset: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measures all ways in turns for the weights of a preset; one row per way."""
    addresses = free_addresses(2)
    team = [Contestant(worker, preset, rank, addresses, steps) for rank in range(2)]
    try:
        first, _ = (contestant.wait() for contestant in team)
        turns: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                for contestant in team:
                    contestant.begin()
                turns[way].append(max(contestant.wait() for contestant in team))
    finally:
        for contestant in team:
            contestant.end()
    rows = []
    for way in WAYS:
        median, fastest, slowest = medians(turns[way])
        rows.append({"preset": preset, "way": way, **first[way], "milliseconds": median, "range": [fastest, slowest]})
    return rows


def worker(answer: Answer, preset: str, rank: int, addresses: list[str], steps: int) -> None:
    """Case of a `Contestant`: a worker, whose turns go through the ways in the order of `WAYS`.

    It first answers the tensors, bytes and accuracy of each way, then the milliseconds per sum in each turn.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    join_cluster(addresses, rank)
    import tensorflow as tf

    from perceiver.model import Perceiver

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    config = getattr(presets, preset)()
    model = Perceiver(**vars(config))
    model.build((None, *config.image_shape))
    shapes = [weight.shape for weight in model.trainable_weights]
    numbers = [
        [np.random.default_rng([owner, i]).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
        for owner in range(2)
    ]
    mine = [tf.constant(number) for number in numbers[rank]]
    expected = np.concatenate([(a.astype(np.float64) + b).ravel() for a, b in zip(*numbers, strict=True)])

    def ways() -> dict[str, Callable[[list[tf.Tensor]], list[tf.Tensor]]]:
        def total(values: Any) -> Any:
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)

        def packed(values: list[tf.Tensor], dtype: tf.DType) -> list[tf.Tensor]:
            vector = tf.concat([tf.reshape(value, [-1]) for value in values], axis=0)
            parts = tf.split(tf.cast(total(tf.cast(vector, dtype)), tf.float32), [int(np.prod(s)) for s in shapes])
            return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]

        def one_by_one(values: list[tf.Tensor]) -> list[tf.Tensor]:
            summed: list[tf.Tensor] = []
            for value in values:  # in the same order on both workers
                with tf.control_dependencies(summed[-1:]):
                    summed.append(total(tf.identity(value)))
            return summed

        return {
            "one by one": one_by_one,
            "list": total,
            "packed": lambda values: packed(values, tf.float32),
            "packed bfloat16": lambda values: packed(values, tf.bfloat16),
        }

    def compiled(way: Callable[[list[tf.Tensor]], list[tf.Tensor]]) -> Callable[[], list[tf.Tensor]]:
        return tf.function(lambda: strategy.run(way, args=(mine,)), autograph=False)

    functions = {name: compiled(way) for name, way in ways().items()}
    described = {}
    for name, function in functions.items():
        found = np.concatenate([np.ravel(value) for value in function()])
        size = 2 if "bfloat16" in name else 4
        described[name] = {
            "tensors": len(shapes),
            "bytes": size * expected.size,
            "agrees": float(np.abs(found - expected).max() / np.abs(expected).max()),
        }
    answer(described)
    while True:
        for function in functions.values():
            start = time.perf_counter()
            for _ in range(steps):
                function()[-1].numpy()
            answer(1e3 * (time.perf_counter() - start) / steps)


if __name__ == "__main__":
    run_benchmark(main)
