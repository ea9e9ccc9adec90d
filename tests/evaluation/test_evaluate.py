"""`evaluate` on an untrained model: its results follow from the logits that it returns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_perceivers import TINY

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver, attention_maps
from pipeline.data.rows import Rows
from pipeline.data.shard_reader import ShardReader
from pipeline.data.sharded_rows import ShardedRows
from pipeline.data.shards import write_rows
from pipeline.evaluation import metrics
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.evaluate import Evaluation, compiled, evaluate, logits_of
from pipeline.evaluation.predictions import read_predictions, write_predictions
from pipeline.storage import Storage

CONFIG: PerceiverConfig = TINY["patches"]
SETTINGS = EvaluationConfig(corruption_rows=40, corruption_severities=(1, 5), confident_mistakes=7, latency_calls=4)
COARSE_OF = np.array([0, 0, 1, 1, 1], np.int32)


def split(num_rows: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (num_rows, *CONFIG.image_shape), dtype=np.uint8)
    labels = np.arange(num_rows, dtype=np.int32) % CONFIG.num_classes
    return Rows(np.sort(random.permutation(3 * num_rows)[:num_rows]), images, labels, COARSE_OF[labels])


@pytest.fixture(scope="module")
def model() -> Perceiver:
    import keras

    keras.utils.set_random_seed(0)
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | {"zero_init_logits": False}
    made = Perceiver(**fields)
    made.build((None, *CONFIG.image_shape))
    return made


@pytest.fixture(scope="module")
def rows() -> Rows:
    return split(301, seed=1)


@pytest.fixture(scope="module")
def found(model: Perceiver, rows: Rows) -> Evaluation:
    return evaluate(model, rows, split(60, seed=2), SETTINGS, list("abcde"), ["x", "y"])


def test_every_image_is_predicted_once_and_in_order(model: Perceiver, rows: Rows) -> None:
    logits = logits_of(compiled(model, CONFIG.image_shape), rows.images)
    np.testing.assert_allclose(logits, np.asarray(model(rows.images)), atol=1e-5)


def test_results_follow_from_the_logits(found: Evaluation, rows: Rows) -> None:
    results = json.loads(json.dumps(found.results))
    logits, labels = found.test.logits, rows.labels
    assert results["test"] == metrics.scores(logits, labels)
    assert results["validation"] == metrics.scores(found.validation.logits, found.validation.labels)
    assert np.sum(results["confusion"]) == 301
    assert np.trace(results["confusion"]) / 301 == pytest.approx(results["test"]["top1"])
    assert np.mean(results["per_class"]) == pytest.approx(results["test"]["balanced_accuracy"])
    calibration = results["calibration"]
    assert calibration["temperature"] == fit_temperature(found.validation.logits, found.validation.labels)
    assert calibration["loss_after"] == pytest.approx(metrics.cross_entropy(logits, labels, calibration["temperature"]))
    for state in ("before", "after"):
        assert sum(b["rows"] for b in calibration[state]["bins"]) == 301
        assert len(calibration[state]["bins"]) == calibration["num_bins"] == 15


def test_superclasses(found: Evaluation, rows: Rows) -> None:
    coarse = found.results["superclasses"]
    predicted = COARSE_OF[found.test.logits.argmax(axis=1)]
    assert coarse["of_class"] == COARSE_OF.tolist()
    assert coarse["top1"] == pytest.approx((predicted == rows.coarse_labels).mean())
    assert coarse["top1"] >= found.results["test"]["top1"]
    assert np.array(coarse["confusion"]).shape == (2, 2)
    weights = np.bincount(rows.coarse_labels) / 301  # type: ignore[arg-type]
    assert np.dot(weights, coarse["class_top1"]) == pytest.approx(found.results["test"]["top1"])


@pytest.mark.parametrize("known", [None, COARSE_OF.tolist()])
def test_superclasses_of_a_class_that_no_row_is_of(model: Perceiver, rows: Rows, known: list[int] | None) -> None:
    few = rows.take(np.flatnonzero(rows.labels != 4))
    results = evaluate(model, few, few, SETTINGS, list("abcde"), ["x", "y", "z"], known).results
    coarse = json.loads(json.dumps(results["superclasses"], allow_nan=False))
    assert coarse["of_class"] == (known or [*COARSE_OF[:4], -1])
    assert np.array(coarse["confusion"]).shape == (3, 3)
    assert coarse["class_top1"][2] is coarse["per_superclass"][2] is None


def test_rows_whose_pixels_stay_in_shards_are_evaluated_alike(
    model: Perceiver, rows: Rows, found: Evaluation, tmp_path: Path
) -> None:
    storage = Storage(str(tmp_path))
    order = np.random.default_rng(3).permutation(301)
    parts = [rows.take(part) for part in np.array_split(order, 4)]
    shards = [write_rows(part, storage, f"{number}.parquet") for number, part in enumerate(parts)]
    reads = []

    class NotingReader(ShardReader):
        def read(self, entry: Any) -> Rows:
            reads.append(entry["path"])
            return super().read(entry)

    sharded = ShardedRows(NotingReader(storage), shards, rows.image_shape)
    assert len(sharded) == 301
    assert not reads, "the labels alone are read"
    again = evaluate(model, sharded, split(60, seed=2), SETTINGS, list("abcde"), ["x", "y"])
    assert len(reads) <= 4 * 4, "logits, corrupted rows, speed, and rows that are shown"
    np.testing.assert_allclose(again.test.logits, found.test.logits, atol=1e-5)
    np.testing.assert_array_equal(again.test.row_ids, found.test.row_ids)
    assert again.results["test"] == pytest.approx(found.results["test"], rel=1e-4)
    for name in ("confusion", "superclasses", "robustness"):
        assert again.results[name] == found.results[name], name
    for name in ("row_ids", "images", "labels"):
        np.testing.assert_array_equal(again.pictures[name], found.pictures[name])
    np.testing.assert_allclose(again.pictures["attention"], found.pictures["attention"], atol=1e-5)
    picked = np.array([300, 0, 17, 17])
    np.testing.assert_array_equal(sharded.take(picked).images, rows.take(picked).images)
    np.testing.assert_array_equal(sharded.take(picked).row_ids, rows.take(picked).row_ids)


def test_data_without_superclasses(model: Perceiver, rows: Rows) -> None:
    plain = Rows(rows.row_ids, rows.images, rows.labels)
    settings = EvaluationConfig(corruption_rows=0, latency_calls=1)
    results = evaluate(model, plain, plain, settings, list("abcde")).results
    assert results["superclasses"] is None
    assert results["robustness"] is None


def test_robustness_and_speed(found: Evaluation) -> None:
    robustness, speed = found.results["robustness"], found.results["speed"]
    assert robustness["num_examples"] == 40
    assert robustness["top1"].keys() == {"noise", "blur", "brightness", "contrast", "pixelate"}
    assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 1 for values in robustness["top1"].values())
    assert robustness["mean_top1"] == pytest.approx(np.mean(list(robustness["top1"].values())))
    assert 0 < speed["batch_1_median_ms"] <= speed["batch_1_p95_ms"]
    assert speed["batch_256_images_per_second"] > 1000 / speed["batch_1_median_ms"], (
        "a batch is quicker than one by one"
    )


def test_mistakes_are_the_most_confident_and_have_their_pictures(found: Evaluation, rows: Rows) -> None:
    mistakes = found.results["slices"]["confident_mistakes"]
    assert len(mistakes) == 7
    confidence = metrics.softmax(found.test.logits, found.results["calibration"]["temperature"]).max(axis=1)
    wrong = found.test.logits.argmax(axis=1) != rows.labels
    assert mistakes[0]["confidence"] == pytest.approx(float(confidence[wrong].max()))
    assert [m["confidence"] for m in mistakes] == sorted((m["confidence"] for m in mistakes), reverse=True)
    pictures = dict(zip(found.pictures["row_ids"], found.pictures["images"], strict=True))
    shown = [row for entry in found.results["slices"]["worst_classes"] for row in entry["examples"]]
    for row in [*mistakes, *shown]:
        assert row["predicted"] != row["label"]
        (position,) = np.flatnonzero(rows.row_ids == row["row_id"])
        assert rows.labels[position] == row["label"]
        np.testing.assert_array_equal(pictures[row["row_id"]], rows.images[position])


def test_attention_is_that_of_the_model(model: Perceiver, found: Evaluation, rows: Rows) -> None:
    pictures = found.pictures
    assert pictures["attention"].shape[:2] == (CONFIG.num_iterations, len(pictures["attention_row_ids"]))
    np.testing.assert_allclose(pictures["attention"].sum(axis=(2, 3)), 1, atol=1e-5)
    position = np.searchsorted(rows.row_ids, pictures["attention_row_ids"][1])
    maps = attention_maps(model, rows.images[position : position + 1])[:, 0]
    np.testing.assert_allclose(pictures["attention"][:, 1], maps.mean(axis=(1, 2)), atol=1e-6)


def test_predictions_are_read_as_they_were_written(found: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    entry = write_predictions(found.test, storage, "out/test.parquet")
    again = read_predictions(entry, storage)
    for name in ("row_ids", "labels", "logits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found.test, name))
        assert getattr(again, name).dtype == getattr(found.test, name).dtype
    data = bytearray(storage.read_bytes("out/test.parquet"))
    data[len(data) // 2] ^= 1
    storage.write_bytes("out/test.parquet", bytes(data))
    with pytest.raises(ValueError, match=r"test.parquet has SHA-256 .* --force"):
        read_predictions(entry, storage)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruption_severities": (1, 6)}, r"evaluation.corruption_severities = \(1, 6\): give some of 1 2 3 4 5"),
        ({"corruption_severities": ()}, "evaluation.corruption_severities"),
        ({"calibration_bins": 0}, "evaluation.calibration_bins = 0: give at least 1"),
        ({"corruption_rows": -1}, "evaluation.corruption_rows = -1"),
        ({"confident_mistakes": -1}, "evaluation.confident_mistakes = -1: give 0 or more"),
        ({"seed": 2**31}, "evaluation.seed"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)
