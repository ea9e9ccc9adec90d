"""What `fit` needs to go on where it was: a folder with weights, optimizer, best weights, metrics and callbacks.

arrays.npz   weights; optimizer with learning rate and loss scale; state of the dropout's random numbers; best weights
             so far; metrics of an epoch that is not over
state.json   position in the data, history, state of the callbacks

No HDF5 file: where its disk is full, the library takes the process down with it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from pipeline.checkpoint_store import STATE_FILE, CheckpointError

ARRAYS_FILE = "arrays.npz"


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
        order: what the order of the rows follows from: shuffle seed, global batch size and number of rows.
    """

    epoch: int = 0
    step: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_weights: list[np.ndarray] = field(default_factory=list)
    metrics: list[np.ndarray] = field(default_factory=list)
    order: list[int] = field(default_factory=list)


def save(directory: Path, model: keras.Model, progress: Progress) -> None:
    """Writes a checkpoint into `directory`, which must exist.

    Raises:
        CheckpointError: if there is no room, say; names the directory.
    """
    try:
        _write(directory, model, progress)
    except OSError as error:
        raise CheckpointError.at(str(directory), error) from error


def _write(directory: Path, model: keras.Model, progress: Progress) -> None:
    groups = {name: [np.array(variable) for variable in variables] for name, variables in _variables(model).items()}
    groups |= {"best": progress.best_weights, "metric": progress.metrics}
    arrays = {f"{name}_{i}": value for name, values in groups.items() for i, value in enumerate(values)}
    np.savez(directory / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
    state = asdict(progress)
    del state["best_weights"], state["metrics"]
    (directory / STATE_FILE).write_text(json.dumps(state))


def load(directory: Path, model: keras.Model) -> Progress:
    """Sets weights and optimizer of a built and compiled `model`; returns the rest.

    Raises:
        ValueError: if the checkpoint is of another model or optimizer.
    """
    model.optimizer.build(model.trainable_variables)
    progress = Progress(**json.loads((directory / STATE_FILE).read_text()))
    with np.load(directory / ARRAYS_FILE) as arrays:

        def group(name: str) -> list[np.ndarray]:
            return [arrays[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in arrays))]

        progress.best_weights, progress.metrics = group("best"), group("metric")
        for name, variables in _variables(model).items():
            values = group(name)
            expected, found = [tuple(v.shape) for v in variables], [value.shape for value in values]
            if expected != found:
                raise ValueError(
                    f"{directory / ARRAYS_FILE} is of another model or optimizer: its {name} variables have the shapes "
                    f"{found}, not {expected}"
                )
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
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


def _variables(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """All that training changes, by kind."""
    weights = {id(variable) for variable in model.weights}
    return {
        "weight": model.weights,
        "optimizer": model.optimizer.variables,
        # State of each seed generator, which Keras counts among a model's variables but not among its weights.
        "random": [variable for variable in model.variables if id(variable) not in weights],
    }
