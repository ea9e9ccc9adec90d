"""Benefit of early stopping and of TPE, from searches that are replayed on recorded learning curves.

    python benchmarks/search_replay.py asha        # early stopping against none
    python benchmarks/search_replay.py sampler     # TPE against random, by the number of random trials at its start
    python benchmarks/search_replay.py stopped     # TPE with ASHA, stopped trials reported as pruned or as complete

`asha` replays recorded curves in random order, two at a time, with Ray's ASHA as `tune.search` sets it up. The others
need curves of points that were not recorded. They replace the training by a regression on the record
(search_surrogate.py), whose error in cross-validation is printed first. The points come from `tune.proposals.propose`,
as in a search. The record is written by search_record.py.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ending import existing_file, run_benchmark
from rich.console import Console
from rich.table import Table
from search_record import SEARCH, unpack
from search_surrogate import cross_validate, surrogate

from tune.config import SearchConfig
from tune.journal import SCORE, Trial
from tune.proposals import propose
from tune.search import scheduler

RECORD = Path(__file__).parent / "data" / "search_curves.json.gz"
AFTER = (16, 32, 64)
STARTUP = (4, 8, 16, 32)


@dataclass(frozen=True)
class Curve:
    """A recorded training: the validation accuracy after each epoch, and the seconds per epoch."""

    accuracy: tuple[float, ...]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("asha", "sampler", "stopped"))
    parser.add_argument("--record", type=existing_file, default=RECORD)
    parser.add_argument("--repeats", type=int, default=200, help="number of replays (asha) or seeds")
    parser.add_argument("--trials", type=int, default=64, help="curves per replay of asha")
    parser.add_argument("--slots", type=int, default=2, help="trials at a time in a replay of asha")
    parser.add_argument("--jobs", type=int, default=1, help="processes of the replay")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = {"asha": asha, "sampler": sampler, "stopped": stopped}[args.question](args, pool)
    settings = vars(args) | {"record": args.record.name}
    print(json.dumps({"benchmark": "search_replay", "settings": settings, "rows": rows}))


def asha(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Lost accuracy, share of the epochs and share of the time, for several settings of ASHA."""
    columns = ("reduction factor", "grace epochs", "best value lost, points", "epochs trained", "time")
    table = Table(*columns, title=f"ASHA against no early stopping, {args.repeats} replays of {args.trials} curves")
    rows = []
    for factor, grace in itertools.product((2, 3, 4), (1, 2, 3)):
        jobs = [(args.record, seed, args.trials, args.slots, factor, grace) for seed in range(args.repeats)]
        outcomes = list(pool.map(replay_asha, *zip(*jobs, strict=True), chunksize=10))
        lost, epochs, seconds = (interval(values) for values in zip(*outcomes, strict=True))
        rows.append(
            {"reduction_factor": factor, "grace_epochs": grace, "lost": lost, "epochs": epochs, "time": seconds}
        )
        shares = (f"{mean:.1%} ± {half:.1%}" for mean, half in (epochs, seconds))
        table.add_row(str(factor), str(grace), f"{100 * lost[0]:.2f} ± {100 * lost[1]:.2f}", *shares)
    Console(width=120).print(table)
    return rows


def replay_asha(
    record: Path, seed: int, num_trials: int, slots: int, reduction_factor: int, grace_epochs: int
) -> tuple[float, float, float]:
    """One replay: the accuracy lost by early stopping, the share of the epochs trained, the share of the time."""
    rows = unpack(record)["curves"]
    curves = [
        Curve(
            tuple(epoch["val_accuracy"] for epoch in row["epochs"]),
            statistics.median(epoch["seconds"] for epoch in row["epochs"]),
        )
        for row in random.Random(seed).sample(rows, min(num_trials, len(rows)))
    ]
    settings = SearchConfig(
        epochs=len(curves[0].accuracy), reduction_factor=reduction_factor, grace_epochs=grace_epochs
    )
    epochs = epochs_until_stopped(curves, settings, slots)
    best = max(max(curve.accuracy[:n]) for curve, n in zip(curves, epochs, strict=True))
    total = sum(len(curve.accuracy) for curve in curves)
    spent = sum(curve.seconds * n for curve, n in zip(curves, epochs, strict=True))
    whole = sum(curve.seconds * len(curve.accuracy) for curve in curves)
    return max(max(curve.accuracy) for curve in curves) - best, sum(epochs) / total, spent / whole


def epochs_until_stopped(curves: Sequence[Curve], settings: SearchConfig, slots: int) -> list[int]:
    """Epochs for which each curve is trained, if curves start in this order and `slots` of them run at a time."""
    stopper: Any = scheduler(settings)
    trials = [SimpleNamespace(trial_id=str(number)) for number in range(len(curves))]
    epochs, waiting = [0] * len(curves), iter(range(len(curves)))
    clock: list[tuple[float, int]] = []

    def begin(now: float) -> None:
        if (number := next(waiting, None)) is not None:
            stopper.on_trial_add(None, trials[number])
            heapq.heappush(clock, (now + curves[number].seconds, number))

    for _ in range(slots):
        begin(0.0)
    while clock:
        now, number = heapq.heappop(clock)
        epochs[number] += 1
        result = {"epoch": epochs[number], SCORE: curves[number].accuracy[epochs[number] - 1]}
        decision = stopper.on_trial_result(None, trials[number], result)
        if decision == stopper.STOP or epochs[number] == len(curves[number].accuracy):
            stopper.on_trial_complete(None, trials[number], result)
            begin(now)
        else:
            heapq.heappush(clock, (now + curves[number].seconds, number))
    return epochs


def search(record: Path, seed: int, settings: SearchConfig, stopped_as: str | None) -> tuple[list[float], float]:
    """A search on the surrogate, one trial after the other.

    Args:
        record: Packed record of the curves.
        seed: Seed of the sampler.
        settings: Settings of the search.
        stopped_as: Status that the sampler sees for a trial that ASHA has stopped; None: no early stopping.

    Returns:
        The best value after 1, 2, ... trials, and the share of the epochs trained.
    """
    model = surrogate(record)
    settings = replace(settings, seed=seed)
    stopper: Any = scheduler(settings) if stopped_as else None
    trials: list[Trial] = []
    for number in range(settings.num_trials):
        values = propose(model.space, settings, number, trials)
        assert values is not None
        trial = Trial(str(number), values, gflops=0.0, parameters=0, status="finished")
        if stopper:
            stopper.on_trial_add(None, SimpleNamespace(trial_id=trial.name))
        for epoch, accuracy in enumerate(model.curve(values), 1):
            trial.add_epoch({"epoch": epoch, "val_accuracy": float(accuracy)})
            result = {"epoch": epoch, SCORE: float(accuracy)}
            if stopper and stopper.on_trial_result(None, SimpleNamespace(trial_id=trial.name), result) == stopper.STOP:
                trial.status = "finished" if epoch == settings.epochs else stopped_as  # type: ignore[assignment]
                break
        trials.append(trial)
    best = np.maximum.accumulate([trial.best_value or 0.0 for trial in trials])
    return best.tolist(), sum(trial.epochs for trial in trials) / (settings.epochs * len(trials))


def compare(
    args: argparse.Namespace, pool: ProcessPoolExecutor, variants: dict[str, tuple[SearchConfig, str | None]]
) -> list[dict[str, Any]]:
    """Best value after 16, 32 and 64 trials of each variant: mean over the seeds, and gain over the first variant."""
    quality = cross_validate(args.record)
    print(", ".join(f"{name} {value:.4f}" for name, value in quality.items()))
    rows: list[dict[str, Any]] = [{"surrogate": quality}]
    first: np.ndarray | None = None
    columns = ["variant", *(f"after {n}" for n in AFTER), *(f"gain after {n}" for n in AFTER), "epochs trained"]
    table = Table(*columns, title=f"best value, points, mean over {args.repeats} seeds ± 95%")
    for name, (settings, stopped_as) in variants.items():
        jobs = [(args.record, seed, settings, stopped_as) for seed in range(args.repeats)]
        outcomes = list(pool.map(search, *zip(*jobs, strict=True), chunksize=5))
        best = np.array([[values[n - 1] for n in AFTER] for values, _ in outcomes])
        first = best if first is None else first
        share = statistics.mean(share for _, share in outcomes)
        # Not paired by seed, because variants draw different points from the same seed.
        means = [interval(column) for column in best.T]
        gains = [difference(column, base) for column, base in zip(best.T, first.T, strict=True)]
        rows.append({"variant": name, "after": AFTER, "best": means, "gain": gains, "epochs": share})
        cells = [" ± ".join(f"{100 * value:.2f}" for value in pair) for pair in (*means, *gains)]
        table.add_row(name, *cells, f"{share:.1%}")
    Console(width=160).print(table)
    return rows


def sampler(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """TPE with several numbers of random trials at its start, compared with random search."""
    base = replace(SEARCH, num_trials=max(AFTER), epochs=len(unpack(args.record)["curves"][0]["epochs"]))
    variants: dict[str, tuple[SearchConfig, str | None]] = {"random": (replace(base, algorithm="random"), None)}
    for number in STARTUP:
        variants[f"TPE after {number}"] = replace(base, num_startup_trials=number), None
    return compare(args, pool, variants)


def stopped(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Searches with ASHA, whose stopped trials the sampler sees as pruned or as complete."""
    base = replace(SEARCH, num_trials=max(AFTER), epochs=len(unpack(args.record)["curves"][0]["epochs"]))
    return compare(
        args,
        pool,
        {
            "TPE, ASHA, told as pruned": (base, "stopped early"),
            "TPE, ASHA, told as complete": (base, "finished"),
            "random, ASHA": (replace(base, algorithm="random"), "stopped early"),
            "TPE, none stopped": (base, None),
        },
    )


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval."""
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))


def difference(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Difference of the means of two samples, and half the width of its 95% confidence interval."""
    variance = np.var(values, ddof=1) / len(values) + np.var(others, ddof=1) / len(others)
    return float(np.mean(values) - np.mean(others)), float(1.96 * math.sqrt(variance))


if __name__ == "__main__":
    run_benchmark(main)
