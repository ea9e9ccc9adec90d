"""What `fit` needs to go on where it was: a folder with weights, optimizer, best weights, metrics and callbacks.

model.weights.h5   weights and optimizer (Keras's own format)
arrays.npz         state of the dropout's random numbers; best weights so far; metrics of an epoch that is not over
state.json         position in the data, history, state of the callbacks
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

WEIGHTS_FILE, ARRAYS_FILE, STATE_FILE = "model.weights.h5", "arrays.npz", "state.json"


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epoch: number of epochs that are over.
        step: steps taken since, in the epoch that is not over.
        finished: whether no epoch is left, or early stopping has ended the training.
        history: one dict of metrics an epoch that is over, with its number (from 1) under "epoch".
        callbacks: state of each callback by class name.
        best_weights: weights of the epoch with the lowest validation loss.
        metrics: variables of the model's metrics, where `step` > 0.
    """

    epoch: int = 0
    step: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_weights: list[np.ndarray] = field(default_factory=list)
    metrics: list[np.ndarray] = field(default_factory=list)


def save(directory: Path, model: keras.Model, progress: Progress) -> None:
    """Writes a checkpoint into `directory`, which must exist."""
    model.save_weights(directory / WEIGHTS_FILE)
    arrays = {f"best_{i}": value for i, value in enumerate(progress.best_weights)}
    arrays |= {f"metric_{i}": value for i, value in enumerate(progress.metrics)}
    arrays |= {f"random_{i}": np.array(variable) for i, variable in enumerate(_random_states(model))}
    np.savez(directory / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
    state = asdict(progress)
    del state["best_weights"], state["metrics"]
    (directory / STATE_FILE).write_text(json.dumps(state))


def load(directory: Path, model: keras.Model) -> Progress:
    """Sets weights and optimizer of a built and compiled `model`; returns the rest."""
    model.optimizer.build(model.trainable_variables)
    model.load_weights(directory / WEIGHTS_FILE)
    progress = Progress(**json.loads((directory / STATE_FILE).read_text()))
    with np.load(directory / ARRAYS_FILE) as arrays:
        for name, target in (("best", progress.best_weights), ("metric", progress.metrics)):
            target += [arrays[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in arrays))]
        for i, variable in enumerate(_random_states(model)):
            variable.assign(arrays[f"random_{i}"])
    return progress


def metric_values(model: keras.Model) -> list[np.ndarray]:
    """Variables of all metrics, summed over the workers: all of them must call this at the same time."""
    return [np.array(variable) for variable in _metric_variables(model)]


def set_metric_values(model: keras.Model, values: Sequence[np.ndarray]) -> None:
    """Sets what `metric_values` returned; the workers share each sum among them."""
    for variable, value in zip(_metric_variables(model), values, strict=True):
        variable.assign(value)


def _metric_variables(model: keras.Model) -> list[keras.Variable]:
    return [variable for metric in model.metrics for variable in metric.variables]


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """State of each seed generator, which Keras counts among a model's variables but saves with none of its weights."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]
