"""Writes and reads the files of one checkpoint, from which `fit` continues exactly where it stopped.

arrays.npz   weights; optimizer state with learning rate and loss scale; state of the seed generators of dropout; best
             weights so far; metrics of an unfinished epoch
state.json   position in the data, history, state of the callbacks, settings of the training

Keras would write HDF5, whose library aborts the process when the disk is full.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import keras
import numpy as np

from perceiver.config import PerceiverConfig
from pipeline.training.checkpoint_store import STATE_FILE, CheckpointError
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel

ARRAYS_FILE = "arrays.npz"


@dataclass
class TrainingState:
    """The state of a training apart from the variables of its model and optimizer.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of steps taken in the epoch after these.
        finished: Whether the training is over, after its last epoch or by early stopping.
        history: Metrics of each finished epoch, with its number (from 1) under "epoch".
        callbacks: State of each callback by class name.
        best_weights: Weights of the epoch with the lowest validation loss.
        metrics: Variables of the model's metrics, where `step` > 0.
        order: Shuffle seed, global batch size and number of rows, which determine the order of the rows.
        seconds: Time that these steps took; 0 in a checkpoint from before this was kept.
        settings: What `settings_of` gives of the training; empty in a checkpoint from before this was kept.
    """

    epoch: int = 0
    step: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_weights: list[np.ndarray] = field(default_factory=list)
    metrics: list[np.ndarray] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


def settings_of(model: PerceiverConfig | OwnModel, config: TrainingConfig) -> dict[str, Any]:
    """The settings that decide what a training gives, by `section.name`.

    Of a model of one's own only the arguments of its builder are known here, and those only where JSON holds them.
    """
    found = {f"train.{name}": value for name, value in _deciding(config).items()}
    if isinstance(model, PerceiverConfig):
        found |= {f"model.{name}": value for name, value in _deciding(model).items()}
    else:
        found |= {f"model.arguments[{name!r}]": value for name, value in model.arguments.items()}
    return {name: value for name, value in found.items() if _as_json(value) is not None}


def check_settings(state: TrainingState, model: PerceiverConfig | OwnModel, config: TrainingConfig) -> None:
    """Checks that a checkpoint is of a training with these settings: shapes alone do not tell learning rates apart.

    Raises:
        ValueError: if not; names the settings.
    """
    if not state.settings:
        return
    # A setting that is younger than the checkpoint had its default then.
    then = {f"train.{f.name}": f.default for f in fields(config)}
    if isinstance(model, PerceiverConfig):
        then |= {f"model.{f.name}": f.default for f in fields(model)}
    then |= state.settings
    differing = [
        f"{name} = {then.get(name)}, this one has {value}"
        for name, value in settings_of(model, config).items()
        if _as_json(then.get(name)) != _as_json(value)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint is of a training with {'; with '.join(differing)}: give the settings of then, or train "
            "from the start"
        )


def _deciding(section: PerceiverConfig | TrainingConfig) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in fields(section) if f.metadata.get("keyed") is not False}


def _as_json(value: Any) -> str | None:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return None


def save(directory: Path, model: keras.Model, state: TrainingState) -> None:
    """Writes a checkpoint into `directory`, which must exist.

    Raises:
        CheckpointError: if the files cannot be written, for instance because the disk is full; names the directory.
    """
    try:
        _write(directory, model, state)
    except OSError as error:
        raise CheckpointError.at(str(directory), error) from error


def _write(directory: Path, model: keras.Model, state: TrainingState) -> None:
    groups = {
        name: [np.array(variable) for variable in variables] for name, variables in variables_by_kind(model).items()
    }
    groups |= {"best": state.best_weights, "metric": state.metrics}
    arrays = {f"{name}_{i}": value for name, values in groups.items() for i, value in enumerate(values)}
    np.savez(directory / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
    kept = asdict(state)
    del kept["best_weights"], kept["metrics"]
    (directory / STATE_FILE).write_text(json.dumps(kept))


def load(directory: Path, model: keras.Model) -> TrainingState:
    """Restores the variables of a built and compiled `model` and its optimizer; returns the rest of the state.

    Raises:
        ValueError: if the checkpoint belongs to another model or optimizer.
    """
    model.optimizer.build(model.trainable_variables)
    state = TrainingState(**json.loads((directory / STATE_FILE).read_text()))
    with np.load(directory / ARRAYS_FILE) as arrays:

        def group(name: str, variables: Sequence[keras.Variable] = ()) -> list[np.ndarray]:
            values = [arrays[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in arrays))]
            for i, (value, variable) in enumerate(zip(values, variables)):  # noqa: B905  another model is refused below
                if value.dtype.kind == "V":  # NumPy does not know bfloat16, and stores its bytes alone
                    values[i] = value.view(np.array(variable).dtype)
            return values

        state.best_weights, state.metrics = group("best", model.weights), group("metric")
        for name, variables in variables_by_kind(model).items():
            values = group(name, variables)
            expected, found = [tuple(v.shape) for v in variables], [value.shape for value in values]
            if expected != found:
                raise ValueError(
                    f"{directory / ARRAYS_FILE} is of another model or optimizer: its {name} variables have the shapes "
                    f"{found}, not {expected}"
                )
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
    return state


def metric_values(model: keras.Model) -> list[np.ndarray]:
    """Variables of all metrics, summed over the workers; all workers must call this at the same time."""
    return [np.array(variable) for variable in _metric_variables(model)]


def set_metric_values(model: keras.Model, values: Sequence[np.ndarray]) -> None:
    """Sets the values that `metric_values` returned; each sum is divided among the workers."""
    for variable, value in zip(_metric_variables(model), values, strict=True):
        variable.assign(value)


def _metric_variables(model: keras.Model) -> list[keras.Variable]:
    return [variable for metric in model.metrics for variable in metric.variables]


def variables_by_kind(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """All variables that training changes, by kind."""
    weights = {id(variable) for variable in model.weights}
    return {
        "weight": model.weights,
        "optimizer": model.optimizer.variables,
        # The states of the seed generators are among a model's `variables` but not among its `weights`.
        "random": [variable for variable in model.variables if id(variable) not in weights],
    }
