"""Tables of a search: its trials, with the uncertainty of their accuracy, and the mean accuracy per searched value.

    python pipeline/run.py cifar100 --until search --search.num-trials 40 ...
    python benchmarks/search_table.py runs
    python benchmarks/search_table.py benchmarks/data/search_trials.json.gz

Reads the trials of the newest search in a storage folder, finished or not, or a file that `--pack` has written. The
uncertainty of an accuracy is the standard error of a proportion over the validation rows; the seed of the training adds
further variance. The means per value are means of the accuracy after the first epoch, which every trial has; later, the
trials that ASHA stopped would count with an early accuracy. TPE samples good regions more often, so the mean of a value
is not the effect of that value alone.
"""

import argparse
import gzip
import json
import math
import statistics
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from ending import run_benchmark
from rich.console import Console
from rich.table import Table

from tune.space import DIMENSIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="storage folder, or file of packed trials")
    parser.add_argument("--pack", type=Path, help="file for the compressed trials")
    parser.add_argument("--validation-rows", type=int, default=2500, help="validation rows of the search")
    args = parser.parse_args()
    trials = read(args.place)
    if args.pack:
        with gzip.GzipFile(args.pack, "wb", mtime=0) as file:  # the same trials give the same bytes
            file.write(json.dumps(trials, separators=(",", ":")).encode())
    started = [
        trial | {"best": max(row["val_accuracy"] for row in trial["history"])} for trial in trials if trial["history"]
    ]
    console = Console(width=200)
    console.print(trial_table(started, args.validation_rows))
    console.print(value_table(started))
    statuses = {status: sum(trial["status"] == status for trial in trials) for status in {t["status"] for t in trials}}
    print(json.dumps({"benchmark": "search_table", "statuses": statuses, "trials": started}))


def read(place: Path) -> list[dict[str, Any]]:
    """The trials, in the order in which they began."""
    if place.is_file():
        try:
            with gzip.open(place) as file:
                return json.load(file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{place} is no file of packed trials: {error}") from error
    folders = sorted(place.glob("tasks/search/*/state/trials"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise ValueError(f"{place} has no search")
    return [json.loads(path.read_text()) for path in sorted(folders[-1].glob("trial-*.json"))]


def trial_table(trials: list[dict[str, Any]], rows: int) -> Table:
    """A row per trial, the best first; `rows` is the number of validation rows."""
    names = [d.name for d in DIMENSIONS if d.name in trials[0]["values"]]
    short = (name.replace("num_self_attention_", "").replace("num_", "") for name in names)
    table = Table("trial", *short, "GFLOPs", "parameters", "status", "epochs", "best accuracy", "minutes")
    for trial in sorted(trials, key=lambda trial: -trial["best"]):
        values = [f"{trial['values'][name]:.3g}" for name in names]
        error = math.sqrt(trial["best"] * (1 - trial["best"]) / rows)
        minutes = (trial["ended"] - trial["started"]) / 60 if trial["ended"] else math.nan
        cost = (f"{trial['gflops']:.3f}", f"{trial['parameters']:,}")
        epochs, best = str(len(trial["history"])), f"{trial['best']:.2%} ± {error:.2%}"
        table.add_row(trial["name"], *values, *cost, trial["status"], epochs, best, f"{minutes:.1f}")
    return table


def value_table(trials: list[dict[str, Any]]) -> Table:
    """A row per value of each dimension: number of trials, mean accuracy after the first epoch, best accuracy."""
    table = Table("dimension", "value", "trials", "after epoch 1, mean ± 95%", "best")
    for dimension in DIMENSIONS:
        if dimension.scale == "log" or dimension.name not in trials[0]["values"]:
            continue
        groups = defaultdict(list)
        for trial in trials:
            groups[trial["values"][dimension.name]].append(trial)
        for value, group in sorted(groups.items()):
            first = [trial["history"][0]["val_accuracy"] for trial in group]
            half = 1.96 * statistics.stdev(first) / math.sqrt(len(first)) if len(first) > 1 else math.nan
            best = max(trial["best"] for trial in group)
            cells = (str(len(group)), f"{statistics.mean(first):.2%} ± {half:.2%}", f"{best:.2%}")
            table.add_row(dimension.name, str(value), *cells)
    return table


if __name__ == "__main__":
    run_benchmark(main)
