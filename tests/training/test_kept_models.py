"""A model that is kept for the next training gives the same results, to the bit, as one that is built for it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny_training import MODEL, TRAIN

from perceiver.config import PerceiverConfig
from pipeline.data.rows import Rows
from pipeline.training.config import TrainingConfig
from pipeline.training.fit import fit
from pipeline.training.kept_models import Compiled, KeptModels
from pipeline.training.optimization import Rates
from pipeline.training.throughput import StepClock
from pipeline.training.worker import Worker

DIGITS = load_digits()
COSINE = {"learning_rate": 2e-3, "learning_rate_schedule": "cosine", "epochs": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {**COSINE, "optimizer": "adamw", "weight_decay": 0.05},
    "muon": {**COSINE, "optimizer": "muon", "weight_decay": 0.05, "cutmix": 0.5, "precision": "mixed_bfloat16"},
    "plateau": {"optimizer": "sgd", "learning_rate_schedule": "plateau", "plateau_patience": 1, "epochs": 2},
}


class Stop(BaseException):
    """Ends a training as a trial is ended that ASHA stops."""


def rows(start: int, stop: int) -> Rows:
    images = (DIGITS.images[start:stop] * 255 / 16).astype(np.uint8)[..., np.newaxis]
    return Rows(np.arange(start, stop), images, DIGITS.target[start:stop].astype(np.int32))


def train(
    config: TrainingConfig, kept: KeptModels | None, stop_after: int = 99, **model: Any
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Losses and accuracies by epoch, and the variables in the last checkpoint."""
    reports: list[dict[str, float]] = []
    arrays: dict[str, np.ndarray] = {}

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder is not None
        with np.load(folder / "arrays.npz") as found:
            arrays.update(found)
        reports.append({name: metrics[name] for name in ("loss", "val_loss", "accuracy", "learning_rate")})
        if len(reports) == stop_after:
            raise Stop

    worker = Worker(report=report, keep_model=False)
    fit(PerceiverConfig(**{**MODEL, **model}), config, rows(0, 500), rows(500, 601), worker, kept=kept)
    return reports, arrays


@pytest.fixture(autouse=True)
def policy() -> Any:
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_kept_model_trains_as_a_new_one(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, kept = TrainingConfig(**{**TRAIN, **RECIPES[recipe]}), KeptModels()
    other = replace(config, learning_rate=config.learning_rate / 3, weight_decay=config.weight_decay * 2)
    dropout: dict[str, Any] = {"dropout": 0.1}
    train(other, kept, **dropout)
    with pytest.raises(Stop):  # within its first epoch's report
        train(other, kept, stop_after=1, **dropout)
    monkeypatch.setattr("pipeline.training.models.Perceiver", None)  # no other model can be built
    again = train(config, kept, **dropout)
    monkeypatch.undo()
    new = train(config, None, **dropout)
    assert again[0] == new[0]
    assert again[1].keys() == new[1].keys()
    for name, value in new[1].items():
        np.testing.assert_array_equal(again[1][name], value, err_msg=name)
    assert json.dumps(again[0]) != json.dumps(train(other, kept, **dropout)[0]), "the rates reach the steps"


def test_only_models_of_the_same_shape_are_used_again() -> None:
    """Only the choice among them is tested here. The other tests train them."""
    config, kept = TrainingConfig(**{**TRAIN, **COSINE}), KeptModels(most=2)
    built: list[Compiled] = []

    def build() -> Compiled:
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        built.append(Compiled(model, Rates(config), StepClock(50, 1, 1.0)))
        return built[-1]

    def number_of(config: TrainingConfig, latents: int, classes: list[int] | None = None, steps: int = 10) -> int:
        """Which of the models, in the order in which they were built, is lent."""
        shape = PerceiverConfig(**{**MODEL, "num_latents": latents})
        with kept.lend(shape, config, classes, steps, build) as lent:
            return built.index(lent)

    lent = [number_of(config, latents) for latents in (4, 4, 8, 4, 2, 8, 4)]
    assert lent == [0, 0, 1, 0, 2, 3, 4], "the one that was used longest ago makes room"
    assert number_of(replace(config, learning_rate=1e-4), 4) == 4
    assert number_of(replace(config, seed=1), 4) == 5, "another seed has other weights"
    assert number_of(config, 4, [10, 20]) == 6, "the weights of the classes are constants of the steps"
    assert number_of(config, 4, [10, 20], steps=11) == 7, "the schedule depends on the number of steps"


def test_prepared_steps_are_forgotten_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls make TensorFlow prepare the steps of all models again, which takes longer than an epoch of a trial."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(keras.utils, "set_random_seed", counted("seed", keras.utils.set_random_seed))
    monkeypatch.setattr(keras.utils, "clear_session", counted("clear", keras.utils.clear_session))
    config, kept = TrainingConfig(**{**TRAIN, **COSINE, "epochs": 1, "warmup_epochs": 0.0}), KeptModels(most=1)
    expected = {(4, "a new model"): ["seed"], (4, "a kept one"): [], (8, "another shape"): ["seed"]}
    expected |= {(8, "the first model was dropped"): ["clear"], (8, "nothing was dropped"): []}
    for (latents, case), found in expected.items():
        calls.clear()
        kept.free_memory()
        train(config, kept, num_latents=latents)
        assert calls == found, case
