"""Metrics against plain loops and scikit-learn, and predictions of a real model."""

import keras
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

from pipeline.batches import ImageArrays
from pipeline.evaluate import evaluate, metrics, predict


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def test_metrics_equal_the_reference() -> None:
    random = np.random.default_rng(0)
    num_classes, num_rows = 20, 500
    probabilities = softmax(2 * random.normal(size=(num_rows, num_classes)))
    labels = random.integers(0, num_classes, num_rows).astype(np.int32)
    found, classes = metrics(probabilities, labels), np.arange(num_classes)
    assert found["num_examples"] == num_rows
    assert found["top1"] == pytest.approx(accuracy_score(labels, probabilities.argmax(axis=1)), abs=1e-12)
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5, labels=classes), abs=1e-12)
    exact = probabilities / probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
    assert found["loss"] == pytest.approx(log_loss(labels, exact, labels=classes), abs=1e-6)
    recalls = recall_score(labels, probabilities.argmax(axis=1), average=None)
    np.testing.assert_allclose(found["per_class"], recalls, atol=1e-12)
    best_five = np.argsort(-probabilities, axis=1)[:, :5]
    assert found["top5"] == pytest.approx((best_five == labels[:, None]).any(axis=1).mean(), abs=1e-12)


def test_of_equally_likely_classes_the_first_counts() -> None:
    labels = np.arange(10)
    found = metrics(np.full((10, 10), 0.1, np.float32), labels)
    assert (found["top1"], found["top5"]) == (0.1, 0.5)  # a model that knows nothing hits no more than chance
    assert found["per_class"] == [1.0] + [0.0] * 9
    assert found["loss"] == pytest.approx(np.log(10), abs=1e-6)


def test_classes_without_rows_have_no_accuracy() -> None:
    found = metrics(np.eye(4, dtype=np.float32)[[1, 1, 2]], np.array([1, 3, 2]))
    assert found["per_class"] == [None, 1.0, 1.0, 0.0]
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["top5"] == 1.0  # of four classes
    assert np.isfinite(found["loss"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_diverged_is_refused(value: float) -> None:
    probabilities = np.full((3, 4), 0.25, np.float32)
    probabilities[1] = value
    with pytest.raises(ValueError, match="1 of 3 images no finite probabilities"):
        metrics(probabilities, np.array([0, 1, 2]))


def test_every_image_is_predicted_once_and_in_order() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, 4, 1), dtype="uint8"), keras.layers.Flatten(), keras.layers.Dense(6)])
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (11, 4, 4, 1), dtype=np.uint8)
    labels = random.integers(0, 6, 11).astype(np.int32)
    kernel, bias = model.layers[-1].get_weights()
    expected = softmax(images.reshape(11, 16) @ kernel + bias)
    np.testing.assert_allclose(predict(model, images, batch_size=4), expected, atol=1e-5)
    found, probabilities = evaluate(model, ImageArrays(np.arange(11), images, labels))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert found == metrics(probabilities, labels)
