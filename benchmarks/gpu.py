"""All that is to be known of a GPU, in one command: a table, and a line of JSON.

    python benchmarks/gpu.py                        # on the GPUs of this host
    python benchmarks/gpu.py --train cifar-100-python.tar.gz --record gpu.jsonl    # and the accuracy of cifar100_gpu
    python benchmarks/gpu.py --smoke                # tiny sizes on a CPU, only to see that it runs

It measures: a training step of `cifar100_gpu`, `paper_imagenet` and `cifar100` with each implementation of attention,
LayerNorm and GELU, with and without XLA, and of an equal Perceiver in PyTorch with torch.compile if that is installed
(MFU: share of the peak of a large matrix product on the same device); these parts alone, forward and backward; the
images/s that a core augments, which says how many cores a GPU needs; and the throughput of 1, 2, 4, ... workers on the
GPUs of this host, each with the step of the pipeline and what the preset says of XLA. A speed is the median of
`--turns` turns of `--steps` steps, on a batch that lies on the device; the last column has the fastest turn.

`perceiver/implementations.py` has the table that the result decides, `pipeline/devices.py` what else depends on the
device.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from ending import existing_file, run_benchmark, stopped_with_this
from gpu_host import augmented_per_second
from gpu_parts import Part, measure_parts
from gpu_steps import VARIANTS, Job, Speed, jobs, measure_steps, speed_of
from gpu_workers import images_per_second
from rich.console import Console
from rich.table import Table

from pipeline.devices import (
    Precision,
    best_precision,
    load_cusolver,
    multiply_on_gpu,
    require_gpu,
    set_up_tensorflow,
    used_device,
)
from pipeline.training.throughput import matmul_peak

COMPUTE_DTYPES = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16", "float32": "float32"}

LEFT_OUT = ("torch", "parts", "host", "workers")
SMOKE_VARIANTS = ["own", "plain Keras, XLA"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--precision", choices=COMPUTE_DTYPES, help="default: what suits the GPU")
    parser.add_argument("--jobs", nargs="+", help="names of the steps to be measured; default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; two with --smoke")
    parser.add_argument("--workers", type=int, nargs="+", help="default: 1, 2, 4, ... up to the GPUs of this host")
    parser.add_argument(
        "--leave-out", nargs="+", choices=LEFT_OUT, default=[], help="what is not measured beside the steps"
    )
    parser.add_argument("--parallel", type=int, default=3, help="steps that are compiled at the same time")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--train", type=existing_file, help="copy of cifar-100-python.tar.gz; trains cifar100_gpu on it"
    )
    parser.add_argument("--record", type=Path, default=Path("gpu.jsonl"), help="of the accuracy with --train")
    args = parser.parse_args()
    load_cusolver()
    gpus = [] if args.smoke else tf.config.list_physical_devices("GPU")
    set_up_tensorflow(len(os.sched_getaffinity(0)), bool(gpus))
    if not args.smoke:
        require_gpu("use_gpu")
        multiply_on_gpu("use_gpu")
    capability = tf.config.experimental.get_device_details(gpus[0])["compute_capability"] if gpus else (0, 0)
    precision: Precision = args.precision or best_precision(capability)
    dtype = COMPUTE_DTYPES[precision]
    steps, turns = (2, 2) if args.smoke else (args.steps, args.turns)
    work = chosen(jobs(precision, args.smoke), args.jobs)
    peak = matmul_peak(dtype)
    variants = args.variants or (SMOKE_VARIANTS if args.smoke else list(VARIANTS))
    cases = [(job, variant) for job in work for variant in variants]
    if args.smoke:
        cases = [case for case in cases if case[0] is work[0] or case[1] == variants[0]]
    speeds = []
    for first in range(0, len(cases), args.parallel):
        for speed in measure_steps(cases[first : first + args.parallel], peak, bool(gpus), steps, turns):
            speeds.append(said(speed))
    measured = set(LEFT_OUT) - set(args.leave_out)
    if "torch" in measured:
        speeds += torch_speeds(work, peak, steps, turns, compiled=not args.smoke)
    parts = measure_parts(dtype, args.smoke, calls=3 if args.smoke else 20) if "parts" in measured else []
    seconds = 0.2 if args.smoke else 5.0
    host = {job.name: augmented_per_second(job, seconds) for job in work if "host" in measured}
    counts = args.workers or ([] if args.smoke else _doubling(len(gpus)))
    workers = {}
    for count in counts if "workers" in measured else ():
        workers[count] = images_per_second(work[0], count, bool(gpus), steps, turns)
        print(f"{work[0].name}, {count} workers: {workers[count]:,.1f} images/s", flush=True)
    result = {
        "benchmark": "gpu",
        "smoke": args.smoke,
        "device": used_device(),
        "precision": precision,
        "peak_tflops": peak / 1e12,
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
        "steps": [asdict(speed) for speed in speeds],
        "parts": [asdict(part) for part in parts],
        "augmented_per_second": host,
        "workers": workers,
    }
    show(result, speeds, parts)
    if args.train:
        result["accuracy"] = accuracy(args.train, args.record)
    print(json.dumps(result))


def chosen(work: list[Job], names: list[str] | None) -> list[Job]:
    """The jobs with these names; all, if there are none. An unknown name ends the benchmark."""
    known = {job.name: job for job in work}
    if unknown := [name for name in names or [] if name not in known]:
        sys.exit(f"error: --jobs {unknown[0]}: the jobs are {', '.join(known)}")
    return [known[name] for name in names or known]


def said(speed: Speed) -> Speed:
    """Prints a speed as soon as it is measured, since the next one may take minutes to compile."""
    doubt = "" if speed.is_finite else ", but the loss is not finite"
    rate = f"{speed.images_per_second:,.1f} images/s, MFU {speed.mfu:.1%}"
    print(f"{speed.job}, {speed.variant}: {rate}{doubt}", flush=True)
    return speed


def torch_speeds(work: list[Job], peak: float, steps: int, turns: int, compiled: bool) -> list[Speed]:
    """Speeds of the same jobs in PyTorch, each in its own process; none if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: left out")
        return []
    found = []
    for job in work:
        orders: dict[str, Any] = {"model": asdict(job.model), "precision": job.train.precision, "batch": job.batch}
        orders |= {"label_smoothing": job.train.label_smoothing, "steps": steps, "turns": turns, "compiled": compiled}
        command = [sys.executable, str(Path(__file__).with_name("gpu_torch.py")), json.dumps(orders)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        answer = json.loads(done.stdout.splitlines()[-1])
        name = "PyTorch, torch.compile" if compiled else "PyTorch"
        found.append(said(speed_of(job, name, answer["parameters"], answer["images_per_second"], peak)))
    return found


def accuracy(archive: Path, record: Path) -> list[dict[str, Any]]:
    """Trains the preset cifar100_gpu and evaluates it on the test images, by `benchmarks/accuracy.py`."""
    script = Path(__file__).with_name("accuracy.py")
    command = [
        sys.executable,
        str(script),
        "--preset",
        "cifar100_gpu",
        "--archive",
        str(archive),
        "--record",
        str(record),
    ]
    with stopped_with_this(command, stdout=subprocess.PIPE) as process:
        printed, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    *table, line = printed.rstrip().splitlines()
    print("\n".join(table))
    return json.loads(line)["runs"]


def show(result: dict[str, Any], speeds: list[Speed], parts: list[Part]) -> None:
    console = Console(width=120)
    title = f"Training steps on {result['device']}, {result['precision']}; peak {result['peak_tflops']:.2f} TFLOP/s"
    table = Table("step", "computed by", "batch", "parameters", "images/s", "MFU", "fastest", title=title)
    for speed in speeds:
        rates = f"{speed.images_per_second:,.1f}", f"{speed.mfu:.1%}", f"{speed.fastest:,.1f}"
        variant = speed.variant if speed.is_finite else f"{speed.variant} (loss not finite)"
        table.add_row(speed.job, variant, f"{speed.batch}", f"{speed.parameters:,}", *rates)
    console.print(table)
    if parts:
        table = Table("part", "computed by", "ms", "difference", title="Forward and backward pass of the parts")
        for part in parts:
            table.add_row(part.part, part.implementation, f"{part.milliseconds:.3f}", f"{part.difference:.0e}")
        console.print(table)
    best: dict[str, float] = {}
    for speed in speeds:
        best[speed.job] = max(best.get(speed.job, 0.0), speed.images_per_second)
    if result["augmented_per_second"]:
        table = Table("step", "images/s a core augments", "cores a device needs", title="Augmentation on the host")
        for name, rate in result["augmented_per_second"].items():
            table.add_row(name, f"{rate:,.0f}", f"{best[name] / rate:.2f}")
        console.print(table)
    if result["workers"]:
        table = Table("workers", "images/s together", "of as many alone", title="Workers on this host")
        first, alone = next(iter(result["workers"].items()))
        for count, rate in result["workers"].items():
            table.add_row(f"{count}", f"{rate:,.1f}", f"{rate / (alone / first * count):.0%}")
        console.print(table)


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


if __name__ == "__main__":
    run_benchmark(main)
