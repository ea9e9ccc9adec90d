"""Memory and time of attention in chunks, compared with plain attention.

    python benchmarks/chunked_attention.py

Measures the forward and backward pass of a cross-attention block on one image, as a compiled graph (tf.function) in
float32. The latents are 1,024 wide, the data array is 261 wide, as for ImageNet with Fourier features, and keys and
values are 256 wide. Each case runs in its own process. Its memory is the peak resident set of the first step minus the
resident set before it, when block, inputs and graph exist. Its time is the median of its turns, which the cases take
alternately. The requirements for chunks at 50,176 inputs are a fifth of the memory, at most 1.2 times the time, and an
exponent of time over inputs of at most 1.1.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from ending import run_benchmark
from rich.console import Console
from rich.table import Table
from turns import Answer, Contestant, medians

LATENT_DIM, DATA_DIM, ATTENTION_DIM = 1024, 261, 256
SLOWER_AT_MOST = 1.1  # relative time up to which a chunk size may be chosen for its memory


@dataclass(frozen=True)
class Case:
    """A cross-attention block to measure."""

    num_inputs: int
    """Number of rows of the data array, M."""
    chunk_size: int | None
    """Rows per chunk; None for plain attention."""
    num_latents: int
    num_heads: int
    threads: int
    jit_compile: bool = False
    """Whether the step is compiled with XLA."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-inputs", type=int, nargs="+", default=[*(1024 * 2**i for i in range(6)), 50176])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--num-latents", type=int, default=512)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case")
    parser.add_argument("--xla", action="store_true", help="compile the step with XLA")
    args = parser.parse_args()

    def case(num_inputs: int, chunk_size: int | None) -> Case:
        return Case(num_inputs, chunk_size, args.num_latents, args.num_heads, args.threads, args.xla)

    largest = max(args.num_inputs)
    by_chunk = compare([case(largest, None), *(case(largest, size) for size in args.chunk_sizes)], args.rounds)
    show(f"Chunk sizes, {largest:,} inputs x {args.num_latents} latents, {args.num_heads} heads", by_chunk)
    fast = [row for row in by_chunk[1:] if row["relative_time"] <= SLOWER_AT_MOST] or by_chunk[1:]
    best = min(fast, key=lambda row: row["peak_mib"])["chunk_size"]
    by_inputs = [compare([case(size, None), case(size, best)], args.rounds) for size in sorted(args.num_inputs)[:-1]]
    by_inputs.append([row for row in by_chunk if row["chunk_size"] in (None, best)])
    show(f"Numbers of inputs, chunks of {best}", [row for pair in by_inputs for row in pair])
    plain, chunked = [pair[0] for pair in by_inputs], [pair[1] for pair in by_inputs]
    half = len(by_inputs) // 2
    result = {
        "benchmark": "chunked_attention",
        "settings": vars(args),
        "best_chunk_size": best,
        "exponent": {"plain": exponent(plain), "chunked": exponent(chunked)},
        # With few inputs, the parts that do not depend on them (queries, MLP) lower the exponent.
        "exponent_of_upper_half": {"plain": exponent(plain[half:]), "chunked": exponent(chunked[half:])},
        "by_chunk_size": by_chunk,
        "by_num_inputs": by_inputs,
    }
    for name in ("exponent", "exponent_of_upper_half"):
        print(f"{name} of time over inputs: {result[name]}")
    print(json.dumps(result))


def compare(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Measures all cases in turns; the first is plain attention, with which the others are compared."""
    contestants: list[Contestant] = []
    starts = []
    try:
        for case in cases:
            contestants.append(Contestant(measure, case))
            starts.append(contestants[-1].wait())
        turns = [[contestant.turn() for contestant in contestants] for _ in range(rounds)]
    finally:
        for contestant in contestants:
            contestant.end()
    rows = []
    for i, (case, start) in enumerate(zip(cases, starts, strict=True)):
        median, fastest, slowest = medians(turn[i] for turn in turns)
        rows.append(
            {
                "num_inputs": case.num_inputs,
                "chunk_size": case.chunk_size,
                "peak_mib": start["peak_bytes"] / 2**20,
                "milliseconds": 1e3 * median,
                "milliseconds_range": [1e3 * fastest, 1e3 * slowest],
                "first_step_seconds": start["first_step_seconds"],
                "difference": difference(starts[0]["results"], start["results"]),
            }
        )
    for row in rows:
        row["memory_saved"] = rows[0]["peak_mib"] / row["peak_mib"]
        row["relative_time"] = row["milliseconds"] / rows[0]["milliseconds"]
    return rows


def measure(answer: Answer, case: Case) -> None:
    """Case of a `Contestant`: answers peak memory, results and time of the first step, then each turn's seconds."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    from perceiver.blocks import CrossAttentionBlock

    tf.config.threading.set_intra_op_parallelism_threads(case.threads)
    tf.config.threading.set_inter_op_parallelism_threads(case.threads)
    keras.utils.set_random_seed(0)
    latents = tf.random.normal((1, case.num_latents, LATENT_DIM), seed=1)
    data = tf.random.normal((1, case.num_inputs, DATA_DIM), seed=2)
    upstream = tf.random.normal((1, case.num_latents, LATENT_DIM), seed=3)
    block = CrossAttentionBlock(case.num_heads, ATTENTION_DIM, ATTENTION_DIM, chunk_size=case.chunk_size)
    block.build(latents.shape, data.shape)

    @tf.function(jit_compile=case.jit_compile)
    def step() -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch([latents, data])
            outputs = block(latents, data)
        inputs = {"latents": latents, "data": data} | {v.path: v.value for v in block.trainable_variables}
        return {"outputs": outputs, **tape.gradient(outputs, inputs, output_gradients=upstream)}

    step.get_concrete_function()
    before = resident_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak of the resident set
    start = time.perf_counter()
    tensors = step()
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM") - before
    results = {name: tensor.numpy() for name, tensor in tensors.items()}
    answer({"peak_bytes": peak, "first_step_seconds": seconds, "results": results})
    del tensors, results
    while True:
        start = time.perf_counter()
        step()
        answer(time.perf_counter() - start)


def resident_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS` is the current value, `VmHWM` the peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def difference(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """Largest difference in the outputs and gradients, each relative to the largest entry of its tensor."""
    return max(
        float(np.abs(found[name] - value).max() / np.abs(value).max())
        for name, value in expected.items()
        # The bias of the keys shifts all logits of a query by the same amount, so its gradient is rounding error only.
        if not name.endswith("key/bias")
    )


def exponent(rows: list[dict[str, Any]]) -> float | None:
    """Slope of log time over log inputs by least squares."""
    if len(rows) < 2:
        return None
    inputs = [math.log(row["num_inputs"]) for row in rows]
    return float(np.polyfit(inputs, [math.log(row["milliseconds"]) for row in rows], 1)[0])


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table("inputs", "chunk", "peak MiB", "saved", "ms", "range", "time", "difference", title=title)
    for row in rows:
        low, high = row["milliseconds_range"]
        table.add_row(
            f"{row['num_inputs']:,}",
            str(row["chunk_size"] or "plain"),
            f"{row['peak_mib']:,.0f}",
            f"{row['memory_saved']:.1f} x",
            f"{row['milliseconds']:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{row['relative_time']:.2f} x",
            f"{row['difference']:.1e}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    run_benchmark(main)
