"""A regression on recorded learning curves, which predicts the curves of points that were not trained."""

import math
import random
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from search_record import SEARCH, Settings, recipe, unpack

from tune.space import Space


class Surrogate:
    """A Gaussian process on recorded curves, with a separate output for each epoch.

    The inputs are the positions of the values within the range of their dimension, from 0 to 1 on a log scale.

    Args:
        rows: Recorded curves, as `search_record` writes them.
        space: The search space of their samples.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], space: Space) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        self.space = space
        inputs = np.array([self._position(row["sample"]) for row in rows])
        targets = np.array([[epoch["val_accuracy"] for epoch in row["epochs"]] for row in rows])
        self.mean, self.std = targets.mean(0), targets.std(0)
        scaled = (targets - self.mean) / self.std
        kernel = ConstantKernel() * Matern(np.ones(inputs.shape[1]), (0.05, 50), nu=2.5) + WhiteKernel(0.05)
        # The hyperparameters are fitted to the last epoch and used for all epochs, which have the same inputs.
        with warnings.catch_warnings():
            # The length scale of a dimension without effect ends at its bound, which gives this warning.
            warnings.simplefilter("ignore", ConvergenceWarning)
            last = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0).fit(inputs, scaled[:, -1])
        self.process = GaussianProcessRegressor(last.kernel_, optimizer=None).fit(inputs, scaled)

    def curve(self, sample: dict[str, Any]) -> np.ndarray:
        """Validation accuracy after each epoch."""
        return self.curves([sample])[0]

    def curves(self, samples: Sequence[dict[str, Any]]) -> np.ndarray:
        """Validation accuracies of several samples, (samples, epochs)."""
        inputs = np.array([self._position(sample) for sample in samples])
        return self.process.predict(inputs) * self.std + self.mean

    def _position(self, sample: dict[str, Any]) -> list[float]:
        ends = {d.name: self.space.values[d.name] for d in self.space.open}
        return [math.log(sample[name] / v[0]) / math.log(v[-1] / v[0]) for name, v in ends.items()]


def record_space(record: dict[str, Any]) -> Space:
    """The search space of a record's samples."""
    return Space.of(SEARCH, recipe(Settings(**record["settings"]))[0])


@cache
def surrogate(record: Path) -> Surrogate:
    """The surrogate of all curves of a record."""
    contents = unpack(record)
    return Surrogate(contents["curves"], record_space(contents))


def cross_validate(record: Path, folds: int = 10) -> dict[str, float]:
    """Error of the surrogate at the last epoch, on curves that are held out of its fit."""
    contents = unpack(record)
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
