"""Overhead of a search trial: the CPU time that it takes besides its training.

    python benchmarks/search_overhead.py                         # this checkout
    python benchmarks/search_overhead.py --tree ../other         # another checkout, for instance before a change

Runs the pipeline up to its search on the embedded digits: 16 trials that differ only in the learning rate, with about
10 s of training each, without early stopping, and as many at a time as there are CPUs. The overhead of a trial is the
CPU time in which it does not train: start of its process, import of TensorFlow, tracing, checkpoints and Ray Tune. It
is CPUs x seconds of the search minus the time of all epochs, divided by the trials. Every epoch counts with the median
duration of the epochs after the first, so that tracing, which is in the first, counts as overhead.

The numbers come from MLflow and the manifest of the task, which every version of the pipeline records.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from ending import run_benchmark, run_pipeline
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# All searched settings except the learning rate, fixed at the values of the preset.
FIXED = {
    "model.num-latents": 16,
    "model.latent-dim": 64,
    "model.num-self-attention-heads": 4,
    "model.num-iterations": 2,
    "model.num-self-attention-blocks": 1,
    "train.weight-decay": 0.01,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to measure")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        search(args.tree.resolve(), Path(folder), args.trials, args.epochs)
        result = measure(Path(folder), len(os.sched_getaffinity(0)))
    table = Table("trials", "CPUs", "search", "training a trial", "overhead a trial", "of it while trials run")
    names = ("search_seconds", "training_seconds", "overhead_seconds", "overhead_without_begin_and_end_seconds")
    numbers = (f"{result[name]:.1f} s" for name in names)
    table.add_row(str(result["trials"]), str(result["cpus"]), *numbers)
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "search_overhead", "epochs": args.epochs, **result}))


def search(tree: Path, storage: Path, trials: int, epochs: int) -> None:
    """Runs the pipeline of `tree` to the end of its search."""
    options: dict[str, Any] = {"search.num-trials": trials, "search.epochs": epochs, "search.grace-epochs": epochs}
    options |= {**FIXED, "storage": storage, "until": "search"}
    command = [sys.executable, str(tree / "pipeline" / "run.py"), "quickstart"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    # PYTHONPATH makes sure that the checkout is measured and not an installed copy of the project.
    run_pipeline(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=DEVNULL)


def measure(storage: Path, cpus: int) -> dict[str, Any]:
    """Seconds of the search, and of training and overhead per trial, from the records of the run."""
    (path,) = storage.glob("tasks/search/*/manifest.json")
    manifest = json.loads(path.read_text())
    search_seconds = manifest["seconds"]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'perceiver'")
    training = []
    for run in client.search_runs([experiment.experiment_id]):
        if "val_accuracy" in run.data.metrics and "learning_rate" in run.data.params:
            seconds = [metric.value for metric in client.get_metric_history(run.info.run_id, "seconds")]
            training.append(len(seconds) * statistics.median(seconds[1:]))
    overhead = (cpus * search_seconds - sum(training)) / len(training)
    # The work before the first trial and after the last one is done once per search. Older versions do not record it.
    times = [(trial["started"], trial["ended"]) for trial in manifest["output"]["trials"] if "ended" in trial]
    trials_seconds = max(end for _, end in times) - min(start for start, _ in times) if times else search_seconds
    return {
        "trials": len(training),
        "cpus": cpus,
        "search_seconds": search_seconds,
        "training_seconds": statistics.mean(training),
        "overhead_seconds": overhead,
        "overhead_without_begin_and_end_seconds": overhead - cpus * (search_seconds - trials_seconds) / len(training),
    }


if __name__ == "__main__":
    run_benchmark(main)
