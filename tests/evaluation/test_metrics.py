"""Metrics and calibration against scikit-learn and SciPy, and in cases worked out by hand."""

import numpy as np
import pytest
import scipy.special
from scipy.optimize import minimize_scalar
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    recall_score,
    top_k_accuracy_score,
)

from pipeline.evaluation import metrics
from pipeline.evaluation.calibration import TEMPERATURES, fit_temperature, reliability


def sample(num_rows: int = 500, num_classes: int = 20, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their probabilities."""
    random = np.random.default_rng(0)
    logits = (scale * random.normal(size=(num_rows, num_classes))).astype(np.float32)
    cumulative = metrics.softmax(logits).cumsum(axis=1)
    labels = (cumulative < random.random((num_rows, 1)) * cumulative[:, -1:]).sum(axis=1).astype(np.int32)
    return logits, labels


def test_scores_equal_the_reference() -> None:
    logits, labels = sample()
    found, classes, predicted = metrics.scores(logits, labels), np.arange(20), logits.argmax(axis=1)
    exact = scipy.special.softmax(logits.astype(np.float64), axis=1)
    assert found["num_examples"] == 500
    assert found["top1"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=classes), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert found["loss"] == pytest.approx(log_loss(labels, exact, labels=classes), abs=1e-9)
    recalls = metrics.recalls(confusion_matrix(labels, predicted, labels=classes))
    np.testing.assert_allclose(np.array(recalls, float), recall_score(labels, predicted, average=None), atol=1e-12)


def test_the_loss_of_a_confident_mistake_is_finite() -> None:
    assert metrics.cross_entropy(np.array([[1000.0, 0.0]], np.float32), np.array([1])) == 1000


def test_of_equal_logits_the_first_class_wins() -> None:
    found = metrics.scores(np.zeros((10, 10), np.float32), np.arange(10))
    assert (found["top1"], found["top5"]) == (0.1, 0.5)  # constant logits score no better than chance
    assert found["loss"] == pytest.approx(np.log(10))


def test_classes_without_rows_have_no_accuracy() -> None:
    confusion = confusion_matrix([1, 3, 2], [1, 1, 2], labels=range(4))
    assert metrics.recalls(confusion) == [None, 1.0, 1.0, 0.0]


def test_classes_count_alike_in_the_balanced_accuracy_and_those_without_rows_not_at_all() -> None:
    labels, predicted = np.array([0] * 8 + [3] * 2), np.array([0] * 8 + [0, 3])
    found = metrics.scores(np.eye(5)[predicted], labels)
    assert (found["top1"], found["balanced_accuracy"]) == (0.9, 0.75)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_diverged_is_refused(value: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1] = value
    with pytest.raises(ValueError, match="1 of 3 images no finite logits"):
        metrics.scores(logits, np.array([0, 1, 2]))


def test_the_superclass_of_each_class_comes_from_the_rows() -> None:
    labels, coarse = np.array([0, 2, 1, 0]), np.array([1, 0, 1, 1])
    assert metrics.superclass_of_class(labels, coarse, 3).tolist() == [1, 1, 0]
    assert metrics.superclass_of_class(labels, coarse, 4).tolist() == [1, 1, 0, -1]
    with pytest.raises(ValueError, match="class 0 belong to several"):
        metrics.superclass_of_class(labels, np.array([0, 0, 1, 1]), 3)


def test_confused_pairs_are_the_most_frequent_mistakes() -> None:
    confusion = np.array([[9, 1, 0], [4, 5, 0], [0, 2, 8]])
    assert metrics.confused_pairs(confusion, 2) == [
        {"label": 1, "predicted": 0, "rows": 4},
        {"label": 2, "predicted": 1, "rows": 2},
    ]
    assert len(metrics.confused_pairs(confusion, 9)) == 3, "what never happened is no mistake"


def test_a_confusion_matrix_of_very_many_classes_takes_little_memory() -> None:
    classes = 100_000  # 80 GB with zeros
    labels = np.repeat(np.arange(classes), 2)
    predicted = labels.copy()
    predicted[[0, 1, 5, 199_999]] = [7, 7, 3, 0]
    confusion = metrics.confusion_of(labels, predicted, classes)
    assert metrics.confused_pairs(confusion, 2) == [
        {"label": 0, "predicted": 7, "rows": 2},
        {"label": 2, "predicted": 3, "rows": 1},
    ]
    assert metrics.recalls(confusion)[:3] == [0.0, 1.0, 0.5]
    assert metrics.extreme_classes(confusion, 1, worst=True) == [{"label": 0, "accuracy": 0.0, "rows": 2}]
    few = labels < 3
    dense = confusion_matrix(labels[few], predicted[few], labels=range(8))
    np.testing.assert_array_equal(metrics.confusion_of(labels[few], predicted[few], 8).toarray(), dense)
    assert metrics.recalls(metrics.confusion_of(labels[few], predicted[few], 8)) == metrics.recalls(dense)


def test_calibration_error_by_hand() -> None:
    # Bins of a fifth: 0.55 alone and wrong; 0.6 on an edge, so below it, and right; 0.9 and 1.0, one of them right.
    sure = np.array([0.55, 0.6, 0.9, 1.0])
    found = reliability(np.stack([sure, 1 - sure], axis=1), np.array([1, 0, 0, 1]), num_bins=5)
    assert found["ece"] == pytest.approx((abs(1 - 1.15) + abs(1 - 1.9)) / 4)
    assert [b["rows"] for b in found["bins"]] == [0, 0, 2, 0, 2]
    assert found["bins"][2] == {
        "lower": pytest.approx(0.4),
        "upper": pytest.approx(0.6),
        "rows": 2,
        "confidence": pytest.approx(0.575),
        "accuracy": 0.5,
    }
    assert found["bins"][3]["accuracy"] is None


def test_temperature_is_that_of_the_smallest_loss() -> None:
    logits, labels = sample(4000)
    for sharpened in (0.5, 1.0, 3.0):
        found = fit_temperature(sharpened * logits, labels)
        best = minimize_scalar(
            lambda t, z=sharpened * logits: metrics.cross_entropy(z, labels, t), bounds=TEMPERATURES, method="bounded"
        )
        assert found == pytest.approx(best.x, rel=1e-3)
        assert found == pytest.approx(sharpened, rel=0.1), "labels follow the probabilities of the logits as they were"
    before = reliability(metrics.softmax(3 * logits), labels, 15)["ece"]
    after = reliability(metrics.softmax(3 * logits, fit_temperature(3 * logits, labels)), labels, 15)["ece"]
    assert after < before / 3


def test_a_temperature_has_bounds() -> None:
    right = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(right, np.array([0, 1])) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert fit_temperature(right, np.array([1, 0])) == pytest.approx(TEMPERATURES[1], rel=1e-3)


def test_classes_and_rows_of_a_report() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.55, 0.45]])
    labels = np.array([1, 0, 1, 0, 1])
    assert metrics.most_confident(probabilities, labels, 2, right=False) == [0, 3]
    assert metrics.most_confident(probabilities, labels, 9, right=False, label=1) == [0, 4]
    assert metrics.most_confident(probabilities, labels, 9, right=True) == [2, 1]
    assert metrics.different_classes([0, 2, 1, 3], labels, 3) == [0, 1, 2]
    assert metrics.different_classes([], labels, 3) == []
    many = np.arange(300_000)  # a look at each pair of them would take an hour
    assert metrics.different_classes(many.tolist(), many // 100_000, 4) == [0, 100_000, 200_000, 1]
    confusion = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(3))
    worst = metrics.extreme_classes(confusion, 5, worst=True)
    assert [entry["label"] for entry in worst] == [1, 0], "class 2 has no rows"
    assert worst[0]["accuracy"] == pytest.approx(1 / 3)
    assert metrics.extreme_classes(confusion, 1, worst=False) == [{"label": 0, "accuracy": 0.5, "rows": 2}]
