"""Trainings of models that are not as usual: an evaluation that is NaN at first or always, weights in bfloat16."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import own_models
import pytest

from pipeline.data.rows import Rows
from pipeline.training.config import TrainingConfig
from pipeline.training.fit import fit
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import Interrupted, NotFinite, Worker

CONFIG: dict[str, Any] = {
    "num_workers": 1,
    "epochs": 6,
    "global_batch_size": 8,
    "random_flip": False,
    "random_crop_padding": 0,
}
pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")


class Training:
    """A training in this process, whose last checkpoint is kept in `folder`."""

    def __init__(self, folder: Path, builder: Callable[..., keras.Model]) -> None:
        self.folder, self.history = folder, list[dict[str, Any]]()
        self.model = OwnModel(builder, image_shape=(8, 8, 1), num_classes=3, pixel_mean=(0.5,), pixel_std=(0.2,))

    def run(self, stop_after: int | None = None, **settings: Any) -> None:
        stop: list[Callable[[], None]] = []

        def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
            self.history.append(metrics)
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(checkpoint, self.folder)  # type: ignore[arg-type]
            if len(self.history) == stop_after:
                stop[0]()

        before = self.folder.with_name("before")
        if self.folder.exists():
            shutil.copytree(self.folder, before, dirs_exist_ok=True)
        worker = Worker(report=report, resume_from=before if before.exists() else None, on_stop=stop.append)
        keras.utils.set_random_seed(0)
        fit(self.model, TrainingConfig(**CONFIG | settings), rows(32), rows(9), worker)

    @property
    def val_losses(self) -> list[float]:
        return [metrics["val_loss"] for metrics in self.history if "val_loss" in metrics]


def rows(number: int) -> Rows:
    images = np.random.default_rng(0).integers(0, 200, (number, 8, 8, 1), dtype=np.uint8)
    return Rows.of(images, (np.arange(number) % 3).astype(np.int32))


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_validation_loss_that_is_nan_at_first_is_the_worst(tmp_path: Path, schedule: str) -> None:
    training = Training(tmp_path / "checkpoint", own_models.nan_at_first)
    training.run(early_stopping_patience=2, learning_rate_schedule=schedule)
    losses = training.val_losses
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1:]).all()
    assert len(losses) == CONFIG["epochs"]
    assert losses[-1] < losses[1], f"it has not improved: {losses}"
    kept = keras.saving.load_model(tmp_path / "checkpoint" / "model.keras", compile=False)
    with np.load(tmp_path / "checkpoint" / "arrays.npz") as arrays:
        for i, weight in enumerate(kept.weights):
            np.testing.assert_array_equal(weight, arrays[f"weight_{i}"], "the last epoch is the best")


def test_a_validation_loss_that_is_always_nan_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    training = Training(tmp_path / "checkpoint", own_models.nan_always)
    with pytest.raises(NotFinite, match=r"not finite after any of 3 epochs: lower train.learning_rate = 0.001$"):
        training.run(early_stopping_patience=2, learning_rate=1e-3)
    assert len(training.history) == 2, "the last epoch has no checkpoint that a later command would take for the end"


def test_weights_in_bfloat16_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole" / "checkpoint", own_models.weights_in_bfloat16)
    whole.run()
    cut = Training(tmp_path / "cut" / "checkpoint", own_models.weights_in_bfloat16)
    with pytest.raises(Interrupted):
        cut.run(stop_after=2)
    cut.run()
    assert cut.val_losses == pytest.approx(whole.val_losses, rel=1e-6)


def test_a_training_does_not_go_on_with_another_learning_rate(tmp_path: Path) -> None:
    """The optimizer's rate is in the checkpoint: the other one would be taken without a word, and not be used."""
    training = Training(tmp_path / "checkpoint", own_models.weights_in_bfloat16)
    constant: dict[str, Any] = {"learning_rate_schedule": "constant", "epochs": 2}
    with pytest.raises(Interrupted):
        training.run(stop_after=1, learning_rate=0.1, **constant)
    with pytest.raises(ValueError, match=r"train.learning_rate = 0.1, this one has 0.2: give the settings of then"):
        training.run(learning_rate=0.2, **constant)
