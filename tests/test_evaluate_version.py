"""A registered model is evaluated by its URI: the results are those of its weights, and the rows are identified."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import mlflow.keras
import numpy as np
import pytest
from image_models import LABEL_NAMES, register_perceiver, save_model, save_perceiver
from mlflow.models import infer_signature
from PIL import Image

from perceiver import presets
from pipeline.data.config import DatasetConfig
from pipeline.data.image_survey import find_images
from pipeline.data.ingest import load
from pipeline.data.rows import rows_digest
from pipeline.evaluate_version import Options, _scores, evaluate_version
from pipeline.evaluation.calibration import reliability
from pipeline.evaluation.metrics import scores, softmax
from pipeline.registry.fetch import fetch, fetch_file
from pipeline.registry.promotion import Evidence
from pipeline.registry.versions import RETRAIN_FILE
from pipeline.tracking.tracker import Tracker

ROOT = Path(__file__).parents[1]
DIGITS = DatasetConfig(source="digits")
TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_perceiver(presets.quickstart(), tmp_path_factory.mktemp("model") / "model.keras")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> str:
    """URI of a registry with the version `models:/digits/1`."""
    folder, test = tmp_path_factory.mktemp("store"), load(DIGITS).test
    row_ids = np.arange(len(test.labels))
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "digits", f"{folder}/mlartifacts")
    evidence = Evidence(rows_digest(test), row_ids, np.ones(len(row_ids), bool), 0.02, 5.0)
    label_names = [str(digit) for digit in range(10)]
    register_perceiver(tracker, "digits", model_path, label_names, test.images[:2], TEMPERATURE, evidence)
    return tracker.uri


def test_results_are_those_of_the_model(registry: str, model_path: str) -> None:
    test = load(DIGITS).test
    logits = np.asarray(keras.saving.load_model(model_path).predict(test.images, verbose=0)) / TEMPERATURE
    found = evaluate_version(Options("models:/digits@champion", registry, data=DIGITS))
    assert (found["model"], found["split"]) == ("models:/digits/1", "test")
    for name, value in scores(logits, test.labels).items():
        assert found[name] == pytest.approx(value, abs=1e-5)
    assert found["ece"] == pytest.approx(reliability(softmax(logits), test.labels, 15)["ece"], abs=1e-4)
    assert found["is_registered_test_split"] is True


def test_other_rows_are_distinguished(registry: str) -> None:
    train = evaluate_version(Options("models:/digits/1", registry, "train", DIGITS))
    validation = evaluate_version(Options("models:/digits/1", registry, "validation", DIGITS))
    other = evaluate_version(Options("models:/digits/1", registry, data=DatasetConfig(source="digits", seed=1)))
    assert [found["num_examples"] for found in (train, validation, other)] == [1295, 142, 360]
    assert not any(found["is_registered_test_split"] for found in (train, validation, other))
    assert len({found["sha256"] for found in (train, validation, other)}) == 3


def write_images(folder: Path, names: dict[int, str]) -> DatasetConfig:
    """The digits of some classes as images in folders of these names."""
    digits = load(DIGITS).test
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        if int(label) in names:
            path = folder / names[int(label)] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    return DatasetConfig(source="files", path=str(folder))


def test_classes_are_those_of_the_model_by_name(registry: str, tmp_path: Path) -> None:
    """A folder with some of the classes numbers them from 0; the model does not."""
    some = write_images(tmp_path / "some", {3: "3", 7: "7"})
    found = evaluate_version(Options("models:/digits/1", registry, data=some))
    rows = load(find_images(some, str(tmp_path), keep_survey=False)).test
    predicted = fetch("models:/digits/1", registry, tmp_path / "model").load()(rows.images)
    assert found["top1"] == pytest.approx(np.mean(predicted.argmax(axis=1) == np.array([3, 7])[rows.labels]))
    assert found["num_examples"] == len(rows)
    other = write_images(tmp_path / "other", {3: "3", 7: "seven"})
    with pytest.raises(
        ValueError, match="does not know 1 of the 2 classes of the data, such as 'seven'; it knows 0, 1"
    ):
        evaluate_version(Options("models:/digits/1", registry, data=other))


def test_the_command_prints_json_or_an_error(registry: str) -> None:
    command = [sys.executable, "-m", "pipeline.evaluate_version", "models:/digits/1", "--tracking-uri", registry]
    result = subprocess.run(
        [*command, "--data.source", "digits"], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["num_examples"] == 360
    assert result.stderr == "", "what the libraries print is in a log"
    with pytest.raises(ValueError, match=r"takes images \(8, 8, 1\), but data.source = cifar100"):
        evaluate_version(Options("models:/digits/1", registry))
    with pytest.raises(ValueError, match="models:/digits/2': it is not in sqlite"):
        evaluate_version(Options("models:/digits/2", registry, data=DIGITS))


def test_the_file_to_train_on_is_found_by_uri(registry: str, model_path: str, tmp_path: Path) -> None:
    found = fetch_file("models:/digits/1", registry, RETRAIN_FILE, tmp_path)
    assert found.read_bytes() == Path(model_path).read_bytes()
    with pytest.raises(ValueError, match="has no file nothing"):
        fetch_file("models:/digits/1", registry, "nothing.keras", tmp_path)


def test_images_are_fitted_as_in_the_training_of_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "images" / LABEL_NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 40), dtype=np.uint8)).save(path)
    data = DatasetConfig(source="files", path=str(tmp_path / "images"))
    digests = {}
    for resize in ("pad", "stretch"):
        save_model(tmp_path / resize, image_shape=(8, 8, 3), decoding={"resize": resize})
        fitted = find_images(
            replace(data, resize=resize, image_size=8, channels=3),
            str(tmp_path),
            keep_survey=False,
        )
        digests[resize] = evaluate_version(Options(str(tmp_path / resize), data=data))["sha256"]
        assert digests[resize] == rows_digest(load(fitted).test)
    assert digests["pad"] != digests["stretch"]
    save_model(tmp_path / "of one size", image_shape=(8, 8, 3))
    with pytest.raises(ValueError, match=r"takes images \(8, 8, 3\), .* has \(8, 40, 3\): give --data.image-size"):
        evaluate_version(Options(str(tmp_path / "of one size"), data=data))


def test_a_model_without_a_softmax_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {3: LABEL_NAMES[0], 7: LABEL_NAMES[1]})
    data = DatasetConfig(source="files", path=str(tmp_path / "images"), image_size=8, channels=3)
    images = keras.Input((8, 8, 3), dtype="uint8")
    model = keras.Model(images, keras.layers.Dense(len(LABEL_NAMES))(keras.layers.Flatten()(images)))
    example = np.zeros((1, 8, 8, 3), np.uint8)
    mlflow.keras.save_model(
        model,
        str(tmp_path / "model"),
        save_exported_model=True,
        signature=infer_signature(example, np.zeros((1, 3), np.float32)),
        pip_requirements=["keras", "mlflow"],
        metadata={"label_names": LABEL_NAMES},
    )
    with pytest.raises(
        ValueError, match=r"/model': gives numbers that are no probabilities: .*end the model in a soft"
    ):
        evaluate_version(Options(str(tmp_path / "model"), data=data))


def test_what_the_rounding_of_probabilities_has_taken_is_null() -> None:
    certain = np.array([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], np.float32)
    assert _scores(certain, np.array([0, 1]))["underflows"] == 0
    found = _scores(certain, np.array([0, 5]))
    assert (found["top1"], found["top5"], found["loss"], found["underflows"]) == (0.5, None, None, 1)
    assert _scores(certain[:, :5], np.array([0, 4]))["top5"] == 1, "there are no more than five classes"
    spread = np.array([[0.5, 0.2, 0.1, 0.1, 0.1, 0]], np.float32)
    found = _scores(spread, np.array([5]))
    assert (found["top5"], found["loss"], found["underflows"]) == (0.0, None, 1), "five classes are likelier"
