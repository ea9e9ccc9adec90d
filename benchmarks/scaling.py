"""How long a training step takes on N workers: a model, held against two hosts with limited links.

    python benchmarks/scaling.py                       # the model against the record, and its table for many workers
    python benchmarks/scaling.py --measure             # sums on two hosts, at three speeds of their link; needs root
    python benchmarks/scaling.py --gain                # training steps there with gradients in float32 and in bfloat16

The hosts are network namespaces of this machine, joined by one link that `tc` limits. Each has a worker with one thread
for a kernel of TensorFlow and two for its graph. A measurement is the fastest of several sums of a float32 vector by
`MultiWorkerMirroredStrategy`, in its ring over gRPC; whatever else runs on the machine can only slow them down. What
the model knows of the hosts, the time of a turn of the ring and of a byte, is taken from vectors of 1 to 24 MB on the
unlimited link; those of 4 and 40 MB are predicted, on all links. The speed of a link is what a TCP connection carries
while another one carries as much in the other direction.

`benchmarks/scaling_model.py` has the model, docs/scaling.md what came out.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_lines
from ending import run_benchmark
from rich.console import Console
from rich.table import Table
from scaling_hosts import goodput, limit, run_workers, two_hosts
from scaling_model import Network, Remedies, Step, at_speed, calibrated, efficiency, ring_seconds, step_seconds

FIELDS = ("kind", "speed", "seconds")
RECORD = Path(__file__).parent / "data" / "scaling.jsonl"
WORKER = Path(__file__).with_name("scaling_worker.py")
UNLIMITED_TURNS = 30
SPEEDS: dict[str, float | None] = {"unlimited": None, "1 Gb/s": 1e9, "100 Mb/s": 1e8}
CALIBRATION, PREDICTED = (1_000_000, 2_000_000, 8_000_000, 16_000_000, 24_000_000), (4_000_000, 40_000_000)
REMEDIES = {
    "as it is": Remedies(),
    "3 buckets": Remedies(buckets=3),
    "bfloat16": Remedies(bytes_factor=0.5),
    "both": Remedies(bytes_factor=0.5, buckets=3),
    "sum every 4th": Remedies(accumulated=4),
}
STEPS = {
    "cifar100_gpu": Step(compute_seconds=512 / 37_000, gradient_bytes=4 * 6_024_036),
    "cifar100_8gpu": Step(compute_seconds=128 / 5_500, gradient_bytes=4 * 15_138_404),
}
"""Computation of one GPU as docs/scaling.md guesses it, at 512 and 128 rows; the gradients follow from the presets."""
GPU_TURN_SECONDS = 50e-6
"""A turn of a ring between GPUs of several hosts; a guess, and their work for a byte is left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON lines file of measurements")
    parser.add_argument("--measure", action="store_true", help="adds sums to the record")
    parser.add_argument("--gain", action="store_true", help="adds training steps to the record")
    parser.add_argument("--speeds", nargs="+", default=list(SPEEDS), choices=SPEEDS)
    parser.add_argument("--turns", type=int, default=6, help="sums of each vector on a limited link")
    args = parser.parse_args()
    if args.measure or args.gain:
        json_lines.begin(args.record, FIELDS)
    if args.measure:
        for row in measured(args.speeds, args.turns):
            json_lines.add(args.record, row)
    if args.gain:
        for row in gains(args.speeds):
            json_lines.add(args.record, row)
    rows = json_lines.read(args.record, FIELDS)
    comparison = compared(rows)
    show_comparison(comparison)
    show_gains([row for row in rows if row["kind"] == "gain"])
    table = predicted()
    show_predictions(table)
    print(json.dumps({"benchmark": "scaling", "comparison": comparison, "predictions": table}))


def measured(speeds: list[str], turns: int) -> Iterator[dict[str, Any]]:
    """Seconds of sums by size, at each speed; of both workers the slower one."""
    with two_hosts():
        for name in speeds:
            limit(SPEEDS[name])
            carried = max(goodput(2.0) for _ in range(4))
            sizes = PREDICTED if SPEEDS[name] else (*CALIBRATION, *PREDICTED)
            found = run_workers(WORKER, {"sizes": sizes, "turns": turns if SPEEDS[name] else UNLIMITED_TURNS})
            sums = {
                size: [max(pair) for pair in zip(*(worker[size] for worker in found), strict=True)] for size in found[0]
            }
            yield {"kind": "sums", "speed": name, "when": today(), "goodput": carried, "seconds": sums}


def today() -> str:
    return time.strftime("%Y-%m-%d")


def gains(speeds: list[str]) -> Iterator[dict[str, Any]]:
    """Seconds of training steps of `cifar100` with its gradients in each dtype, in turns."""
    with two_hosts():
        for name in speeds:
            limit(SPEEDS[name])
            found = run_workers(WORKER, {"train": "cifar100", "batch": 128, "turns": 3, "steps": 6})
            yield {"kind": "gain", "speed": name, "when": today(), "seconds": found[0]}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted and measured seconds, of the newest measurement at each speed."""
    newest = {row["speed"]: row for row in rows if row["kind"] == "sums"}
    if "unlimited" not in newest:
        return []
    network = hosts_network(newest["unlimited"])
    found = []
    for speed, sums in newest.items():
        for size in PREDICTED:
            measured_seconds = min(sums["seconds"][str(size)])
            expected = ring_seconds(size, 2, at_speed(network, sums["goodput"]))
            error = expected / measured_seconds - 1
            found.append(
                {"speed": speed, "bytes": size, "measured": measured_seconds, "predicted": expected, "error": error}
            )
    return found


def hosts_network(unlimited: dict[str, Any]) -> Network:
    """The hosts, from the vectors of `CALIBRATION` on their unlimited link."""
    times = {float(size): min(unlimited["seconds"][str(size)]) for size in CALIBRATION}
    return calibrated(times, 2, unlimited["goodput"])


def predicted() -> list[dict[str, Any]]:
    """Efficiency of steps on 8, 64 and 512 GPUs, a host each, at three speeds, with each remedy."""
    found = []
    for name, step in STEPS.items():
        for gigabits in (10, 25, 100):
            network = Network(gigabits * 1e9 / 8, GPU_TURN_SECONDS, 0.0)
            for workers in (8, 64, 512):
                shares = {remedy: efficiency(step, workers, network, how) for remedy, how in REMEDIES.items()}
                seconds = step_seconds(step, workers, network)
                case: dict[str, Any] = {"step": name, "gigabits": gigabits, "workers": workers, "seconds": seconds}
                found.append(case | shares)
    return found


def show_comparison(rows: list[dict[str, Any]]) -> None:
    table = Table("link", "MB", "measured, ms", "predicted, ms", "error", title="A sum over two hosts")
    for row in rows:
        times = [f"{1e3 * row[name]:.1f}" for name in ("measured", "predicted")]
        table.add_row(row["speed"], f"{row['bytes'] / 1e6:g}", *times, f"{row['error']:+.0%}")
    Console(width=120).print(table)


def show_gains(rows: list[dict[str, Any]]) -> None:
    table = Table("link", "float32, ms", "bfloat16, ms", "ratio", title="Training steps of cifar100 on two hosts")
    for row in {row["speed"]: row for row in rows}.values():
        wide, narrow = (min(row["seconds"][dtype]) for dtype in ("float32", "bfloat16"))
        table.add_row(row["speed"], f"{1e3 * wide:.0f}", f"{1e3 * narrow:.0f}", f"{wide / narrow:.2f}")
    Console(width=120).print(table)


def show_predictions(rows: list[dict[str, Any]]) -> None:
    title = "Predicted throughput, relative to GPUs that need not communicate"
    table = Table("step", "Gb/s", "workers", "step, ms", *REMEDIES, title=title)
    for row in rows:
        shares = [f"{row[remedy]:.0%}" for remedy in REMEDIES]
        table.add_row(row["step"], f"{row['gigabits']}", f"{row['workers']}", f"{1e3 * row['seconds']:.1f}", *shares)
    Console(width=120).print(table)


if __name__ == "__main__":
    run_benchmark(main)
