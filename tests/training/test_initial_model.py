"""A training that begins with the weights of a registered model's `.keras` file."""

import io
import resource
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.data.rows import Rows
from pipeline.training.config import TrainingConfig
from pipeline.training.fit import fit
from pipeline.training.worker import InitialModelError, Worker

MODEL = PerceiverConfig(
    image_shape=(8, 8, 1),
    num_classes=10,
    num_latents=4,
    latent_dim=16,
    num_iterations=1,
    num_self_attention_blocks=1,
    conv_channels=8,
    data_dim=16,
)
FROZEN = TrainingConfig(
    epochs=1,
    global_batch_size=50,
    learning_rate=1e-12,
    weight_decay=0.0,
    random_flip=False,
    num_workers=1,
    initial_model="models:/digits/1",
)


def rows(start: int, stop: int) -> Rows:
    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    return Rows(np.arange(start, stop), images[start:stop], digits.target.astype(np.int32)[start:stop])


def saved(folder: Path, config: PerceiverConfig) -> tuple[Path, keras.Model]:
    keras.utils.set_random_seed(7)
    model = Perceiver(**asdict(config))
    model.build((None, 8, 8, 1))
    for weight in model.trainable_weights:  # far from the initial weights of a new model
        weight.assign(weight + 0.05)
    model.save(folder / "initial.keras")
    return folder / "initial.keras", model


def reports(initial: Path | None) -> list[dict[str, Any]]:
    """The report of a training with a learning rate of nearly zero: its loss is that of the initial weights."""
    found: list[dict[str, Any]] = []
    worker = Worker(report=lambda metrics, folder: found.append(metrics), initial_model=initial)
    fit(MODEL, FROZEN, rows(0, 200), rows(200, 301), worker)
    return found


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_the_first_loss_is_that_of_the_given_weights(tmp_path: Path) -> None:
    initial, model = saved(tmp_path, MODEL)
    validation = rows(200, 301)
    logits = model(validation.images)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected = float(loss(validation.labels, logits))
    assert reports(initial)[-1]["val_loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(reports(None)[-1]["val_loss"] - expected) > 0.01


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    initial, _ = saved(tmp_path, PerceiverConfig(**asdict(MODEL) | {"num_latents": 8}))
    with pytest.raises(InitialModelError, match=r"train.initial_model = models:/digits/1 is another model .*give the"):
        reports(initial)


def test_a_file_that_describes_a_huge_model_is_refused_without_building_it(tmp_path: Path) -> None:
    huge = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    huge.save(tmp_path / "huge.keras")
    with zipfile.ZipFile(tmp_path / "huge.keras") as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["config.json"] = members["config.json"].replace(b'"units": 2', b'"units": 67108864')
    assert b"67108864" in members["config.json"]
    with zipfile.ZipFile(tmp_path / "huge.keras", "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InitialModelError, match="is another model"):
        reports(tmp_path / "huge.keras")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024, "in KiB"


def test_compressed_weights_of_any_size_are_refused_unread(tmp_path: Path) -> None:
    initial, _ = saved(tmp_path, MODEL)
    with zipfile.ZipFile(initial) as file:
        members = {name: file.read(name) for name in file.namelist()}
    weights = io.BytesIO(members["model.weights.h5"])
    with h5py.File(weights, "a") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        del file[names[0]]
        file.create_dataset(names[0], (1 << 30,), "float32", chunks=(1 << 20,), compression="gzip")
    members["model.weights.h5"] = weights.getvalue()
    assert len(members["model.weights.h5"]) < 1 << 20
    with zipfile.ZipFile(initial, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InitialModelError, match="or damaged"):
        reports(initial)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024, "in KiB"
