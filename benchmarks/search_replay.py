"""What early stopping saves and what TPE gains, on learning curves that were recorded once.

    python benchmarks/search_replay.py asha        # early stopping against none
    python benchmarks/search_replay.py sampler     # TPE against random, by the number of random trials at its start
    python benchmarks/search_replay.py stopped     # TPE with ASHA, stopped trials told as pruned or as complete

`asha` replays recorded curves in random order, two at a time, against Ray's own ASHA, as `tune.search` sets it up. The
others need values of points that were not recorded: a regression on the record stands in for the training, whose error
in cross-validation is printed first. The points come from `tune.proposals.propose`, as in a search.

The record is `benchmarks/search_record.py`'s.
"""

import argparse
import gzip
import heapq
import itertools
import json
import math
import random
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from search_record import SEARCH, Settings, recipe

from tune.config import SearchConfig
from tune.proposals import propose
from tune.search import scheduler
from tune.space import Space
from tune.trials import SCORE, Trial

RECORD = Path(__file__).parent / "data" / "search_curves.json.gz"
AFTER = (16, 32, 64)
STARTUP = (4, 8, 16, 32)


@dataclass(frozen=True)
class Curve:
    """A recorded training: validation accuracy after each epoch, and what an epoch takes."""

    accuracy: tuple[float, ...]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("asha", "sampler", "stopped"))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--repeats", type=int, default=200, help="replays, or seeds")
    parser.add_argument("--trials", type=int, default=64, help="curves in a replay of `asha`")
    parser.add_argument("--slots", type=int, default=2, help="trials at a time in a replay of `asha`")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = {"asha": asha, "sampler": sampler, "stopped": stopped}[args.question](args, pool)
    settings = vars(args) | {"record": args.record.name}
    print(json.dumps({"benchmark": "search_replay", "settings": settings, "rows": rows}))


@cache
def read(record: Path) -> dict[str, Any]:
    with gzip.open(record) as file:
        return json.load(file)


# Early stopping


def asha(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Loss of the best value and share of the epochs and of the time, for several settings of ASHA."""
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
    """Best value that is lost, share of the epochs trained, share of the time, in one replay."""
    rows = read(record)["curves"]
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
    """Epochs that each curve gets, when so many are trained at a time in this order."""
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


# Samplers


class Surrogate:
    """Curves of points that were not recorded: a Gaussian process on the recorded ones, each epoch by itself.

    Inputs are the places of the values between the ends of their dimension, on a log scale.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], space: Space) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        self.space = space
        inputs = np.array([self._place(row["sample"]) for row in rows])
        targets = np.array([[epoch["val_accuracy"] for epoch in row["epochs"]] for row in rows])
        self.mean, self.std = targets.mean(0), targets.std(0)
        scaled = (targets - self.mean) / self.std
        kernel = ConstantKernel() * Matern(np.ones(inputs.shape[1]), (0.05, 50), nu=2.5) + WhiteKernel(0.05)
        # Hyperparameters from the last epoch; the others have the same inputs, so that curves stay in order.
        with warnings.catch_warnings():
            # A length at its bound is that of a dimension that does not matter.
            warnings.simplefilter("ignore", ConvergenceWarning)
            last = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0).fit(inputs, scaled[:, -1])
        self.process = GaussianProcessRegressor(last.kernel_, optimizer=None).fit(inputs, scaled)

    def curve(self, sample: dict[str, Any]) -> np.ndarray:
        """Validation accuracy after each epoch."""
        return self.curves([sample])[0]

    def curves(self, samples: Sequence[dict[str, Any]]) -> np.ndarray:
        places = np.array([self._place(sample) for sample in samples])
        return self.process.predict(places) * self.std + self.mean

    def _place(self, sample: dict[str, Any]) -> list[float]:
        ends = {d.name: self.space.values[d.name] for d in self.space.open}
        return [math.log(sample[name] / v[0]) / math.log(v[-1] / v[0]) for name, v in ends.items()]


def record_space(record: dict[str, Any]) -> Space:
    return Space.of(SEARCH, recipe(Settings(**record["settings"]))[0])


@cache
def surrogate(record: Path) -> Surrogate:
    contents = read(record)
    return Surrogate(contents["curves"], record_space(contents))


def cross_validate(record: Path, folds: int = 10) -> dict[str, float]:
    """Error of the surrogate on curves that it has not seen, at the last epoch."""
    contents = read(record)
    rows, space = list(contents["curves"]), record_space(contents)
    random.Random(0).shuffle(rows)
    found, expected = [], []
    for fold in range(folds):
        held_out = rows[fold::folds]
        kept = [row for i, row in enumerate(rows) if i % folds != fold]
        found += list(Surrogate(kept, space).curves([row["sample"] for row in held_out])[:, -1])
        expected += [row["epochs"][-1]["val_accuracy"] for row in held_out]
    errors = np.array(found) - np.array(expected)
    return {
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "std": float(np.std(expected)),
        "r2": float(1 - np.mean(errors**2) / np.var(expected)),
        "rank_correlation": float(np.corrcoef(np.argsort(np.argsort(found)), np.argsort(np.argsort(expected)))[0, 1]),
    }


def searched(record: Path, seed: int, settings: SearchConfig, told_as: str | None) -> tuple[list[float], float]:
    """A search on the surrogate, one trial after the other.

    Args:
        told_as: status with which the sampler is told of a trial that ASHA has stopped; None stops none.

    Returns:
        Best value after 1, 2, ... trials, and the share of the epochs trained.
    """
    model = surrogate(record)
    settings = replace(settings, seed=seed)
    stopper: Any = scheduler(settings) if told_as else None
    trials: list[Trial] = []
    for number in range(settings.num_trials):
        values = propose(model.space, settings, number, trials)
        assert values is not None
        trial = Trial(str(number), values, gflops=0.0, parameters=0, status="finished")
        if stopper:
            stopper.on_trial_add(None, SimpleNamespace(trial_id=trial.name))
        for epoch, accuracy in enumerate(model.curve(values), 1):
            trial.note({"epoch": epoch, "val_accuracy": float(accuracy)})
            result = {"epoch": epoch, SCORE: float(accuracy)}
            if stopper and stopper.on_trial_result(None, SimpleNamespace(trial_id=trial.name), result) == stopper.STOP:
                trial.status = "finished" if epoch == settings.epochs else told_as  # type: ignore[assignment]
                break
        trials.append(trial)
    best = np.maximum.accumulate([trial.best_value or 0.0 for trial in trials])
    return best.tolist(), sum(trial.epochs for trial in trials) / (settings.epochs * len(trials))


def compare(
    args: argparse.Namespace, pool: ProcessPoolExecutor, variants: dict[str, tuple[SearchConfig, str | None]]
) -> list[dict[str, Any]]:
    """Mean best value after 16, 32, 64 trials of each variant over the seeds, and against the first variant."""
    quality = cross_validate(args.record)
    print(", ".join(f"{name} {value:.4f}" for name, value in quality.items()))
    rows: list[dict[str, Any]] = [{"surrogate": quality}]
    first: np.ndarray | None = None
    columns = ["variant", *(f"after {n}" for n in AFTER), *(f"gain after {n}" for n in AFTER), "epochs trained"]
    table = Table(*columns, title=f"best value, points, mean over {args.repeats} seeds ± 95%")
    for name, (settings, told_as) in variants.items():
        jobs = [(args.record, seed, settings, told_as) for seed in range(args.repeats)]
        outcomes = list(pool.map(searched, *zip(*jobs, strict=True), chunksize=5))
        best = np.array([[values[n - 1] for n in AFTER] for values, _ in outcomes])
        first = best if first is None else first
        share = statistics.mean(share for _, share in outcomes)
        # Not paired by seed: the same seed draws other points.
        means = [interval(column) for column in best.T]
        gains = [difference(column, base) for column, base in zip(best.T, first.T, strict=True)]
        rows.append({"variant": name, "after": AFTER, "best": means, "gain": gains, "epochs": share})
        cells = [" ± ".join(f"{100 * value:.2f}" for value in pair) for pair in (*means, *gains)]
        table.add_row(name, *cells, f"{share:.1%}")
    Console(width=160).print(table)
    return rows


def sampler(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    base = replace(SEARCH, num_trials=max(AFTER), epochs=len(read(args.record)["curves"][0]["epochs"]))
    variants: dict[str, tuple[SearchConfig, str | None]] = {"random": (replace(base, algorithm="random"), None)}
    for number in STARTUP:
        variants[f"TPE after {number}"] = replace(base, num_startup_trials=number), None
    return compare(args, pool, variants)


def stopped(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    base = replace(SEARCH, num_trials=max(AFTER), epochs=len(read(args.record)["curves"][0]["epochs"]))
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
    """Mean, and half the width of its 95% interval."""
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))


def difference(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Difference of the means of two samples, and half the width of its 95% interval."""
    variance = np.var(values, ddof=1) / len(values) + np.var(others, ddof=1) / len(others)
    return float(np.mean(values) - np.mean(others)), float(1.96 * math.sqrt(variance))


if __name__ == "__main__":
    main()
