"""The evaluation of one trained model: accuracy, calibration, robustness, speed, and the rows where it is wrong.

`evaluate` takes arrays and returns arrays and JSON-able results; it uses neither tasks nor storage.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.metrics import confusion_matrix

from perceiver.model import Perceiver, attention_maps
from pipeline.data.rows import Rows
from pipeline.data.sharded_rows import ShardedRows
from pipeline.devices import used_device
from pipeline.evaluation.calibration import fit_temperature, reliability
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.corruptions import CORRUPTIONS, corrupt
from pipeline.evaluation.metrics import (
    Confusion,
    confused_pairs,
    confusion_of,
    cross_entropy,
    different_classes,
    extreme_classes,
    most_confident,
    recalls,
    scores,
    softmax,
    superclass_of_class,
)
from pipeline.evaluation.predictions import Predictions

BATCH_SIZE = 256
MOST_IN_MATRIX = 2000
"""Classes of which a whole confusion matrix is kept; of ten times as many it would take gigabytes."""
WARM_UP_CALLS = 5
EXTREME_CLASSES = 5
"""Number of the worst and of the best classes that are shown with images."""
PICTURES_PER_CLASS = 6
CONFUSED_PAIRS = 20
ATTENTION_IMAGES = 6
"""Number of images whose attention maps are kept."""
ATTENTION_LATENTS = 8
"""Number of latents whose own attention maps are kept, for the first of these images."""

Apply = Callable[[np.ndarray], np.ndarray]
"""uint8 images (N, H, W, C) to logits float32 (N, K)."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        results: JSON-able; docs/evaluation.md describes its fields.
        test, validation: Logits of all rows.
        pictures: Arrays for the report: `row_ids` (P,), `images` (P, H, W, C) and `labels` (P,) of the rows that
            `results` names or whose attention is shown; `attention` float32 (iterations, A, rows, columns), the mean
            over heads and latents for the rows `attention_row_ids` (A,); `latent_attention` float32 (iterations, L,
            rows, columns), the mean over heads for the single latents `latents` (L,) of the first of these rows.
    """

    results: dict[str, Any]
    test: Predictions
    validation: Predictions
    pictures: dict[str, np.ndarray]


def compiled(model: keras.Model, image_shape: tuple[int, ...]) -> Apply:
    """Compiles a model of uint8 images to one graph for all batch sizes, as the exported model runs it."""
    signature = [tf.TensorSpec((None, *image_shape), tf.uint8)]
    graph = tf.function(lambda images: model(images, training=False), input_signature=signature)
    return lambda images: graph(tf.constant(images)).numpy()


def logits_of(apply: Apply, images: np.ndarray) -> np.ndarray:
    """Logits float32 (N, K) of uint8 images (N, H, W, C), in the same order."""
    return np.concatenate([apply(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)])


def logits_of_rows(apply: Apply, rows: Rows | ShardedRows) -> np.ndarray:
    """Logits float32 (N, K) of all rows, in order of `row_ids`; of sharded rows one shard is in memory at a time."""
    logits = None
    for positions, images in rows.parts(BATCH_SIZE):
        part = apply(images)
        if logits is None:
            logits = np.empty((len(rows), part.shape[1]), part.dtype)
        logits[positions] = part
    assert logits is not None
    return logits


def evaluate(
    model: keras.Model,
    test: Rows | ShardedRows,
    validation: Rows | ShardedRows,
    config: EvaluationConfig,
    label_names: list[str],
    coarse_label_names: list[str] | None = None,
    coarse_of_class: list[int] | None = None,
) -> Evaluation:
    """Evaluates a model on the test rows; the temperature is fitted to the validation rows.

    Args:
        model: Maps uint8 images to logits; only a Perceiver gives attention maps.
        label_names: Names of the K classes.
        coarse_label_names: Names of the superclasses, if the data set has any.
        coarse_of_class: The superclass of each class, if it is known; else the rows tell it.

    Raises:
        ValueError: if a logit is not finite.
    """
    apply = compiled(model, test.image_shape)
    logits, validation_logits = logits_of_rows(apply, test), logits_of_rows(apply, validation)
    validation_scores, test_scores = scores(validation_logits, validation.labels), scores(logits, test.labels)
    temperature = fit_temperature(validation_logits, validation.labels)
    probabilities = softmax(logits, temperature)
    confusion = confusion_of(test.labels, logits.argmax(axis=1), len(label_names))
    superclasses = _superclass_of_class(test, validation, len(label_names), coarse_of_class)
    results: dict[str, Any] = {
        "label_names": label_names,
        "coarse_label_names": coarse_label_names,
        "test": test_scores,
        "validation": validation_scores,
        "per_class": recalls(confusion),
        "confusion": confusion.toarray().tolist() if len(label_names) <= MOST_IN_MATRIX else None,
        "superclasses": _superclasses(logits, test, superclasses, len(coarse_label_names or ())),
        "calibration": {
            "num_bins": config.calibration_bins,
            "temperature": temperature,
            "loss_before": test_scores["loss"],
            "loss_after": cross_entropy(logits, test.labels, temperature),
            "before": reliability(softmax(logits), test.labels, config.calibration_bins),
            "after": reliability(probabilities, test.labels, config.calibration_bins),
        },
        "robustness": _robustness(apply, test, logits, config) if config.corruption_rows else None,
        "speed": measure_speed(apply, test.take(np.arange(min(BATCH_SIZE, len(test)))).images, config.latency_calls),
        "slices": _slices(probabilities, test, confusion, config.confident_mistakes),
    }
    return Evaluation(
        results,
        Predictions(test.row_ids, test.labels, logits),
        Predictions(validation.row_ids, validation.labels, validation_logits),
        _pictures(model, test, probabilities, results["slices"]),
    )


def measure_speed(apply: Apply, images: np.ndarray, calls: int) -> dict[str, Any]:
    """Latency of a call with one image in milliseconds, and throughput in batches of `BATCH_SIZE` in images/s.

    Measures from arrays in memory to arrays in memory, after `WARM_UP_CALLS`.
    """
    batch = np.resize(images[:BATCH_SIZE], (BATCH_SIZE, *images.shape[1:]))  # it copies all that it is given
    single = [1000 * seconds for seconds in _seconds(apply, images[:1], calls)]
    batched = _seconds(apply, batch, max(3, calls // 20))
    return {
        "batch_1_median_ms": float(np.median(single)),
        "batch_1_p95_ms": float(np.percentile(single, 95)),
        "batch_256_images_per_second": float(BATCH_SIZE / np.median(batched)),
        "device": used_device(),
    }


def _seconds(apply: Apply, images: np.ndarray, calls: int) -> list[float]:
    for _ in range(WARM_UP_CALLS):
        apply(images)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        apply(images)
        seconds.append(time.perf_counter() - start)
    return seconds


def _superclass_of_class(
    test: Rows | ShardedRows, validation: Rows | ShardedRows, num_classes: int, known: list[int] | None
) -> np.ndarray | None:
    """Superclass of each class, int64 (K,), or None if the data have none; -1 of a class that no row is of."""
    if test.coarse_labels is None or validation.coarse_labels is None:
        return None
    if known is not None:
        return np.array(known, np.int64)
    labels = np.concatenate([test.labels, validation.labels])
    return superclass_of_class(labels, np.concatenate([test.coarse_labels, validation.coarse_labels]), num_classes)


def _superclasses(
    logits: np.ndarray, test: Rows | ShardedRows, of_class: np.ndarray | None, count: int
) -> dict[str, Any] | None:
    """Accuracy on superclasses; the superclass of a prediction is that of the predicted class."""
    if of_class is None or test.coarse_labels is None:
        return None
    predicted = logits.argmax(axis=1)
    confusion = confusion_matrix(test.coarse_labels, of_class[predicted], labels=np.arange(count))
    rows = np.bincount(test.coarse_labels, minlength=count)
    hit = predicted == test.labels
    return {
        "of_class": of_class.tolist(),
        "top1": float((of_class[predicted] == test.coarse_labels).mean()),
        "confusion": confusion.tolist(),
        "per_superclass": recalls(confusion),
        # Share of the rows of each superclass whose class, not only superclass, is predicted.
        "class_top1": [float(hit[test.coarse_labels == s].mean()) if rows[s] else None for s in range(count)],
    }


def _robustness(apply: Apply, test: Rows | ShardedRows, logits: np.ndarray, config: EvaluationConfig) -> dict[str, Any]:
    """Top-1 accuracy on corrupted copies of a random subset, and on the same rows without corruption."""
    count = min(config.corruption_rows, len(test.labels))
    positions = np.sort(np.random.default_rng(config.seed).permutation(len(test.labels))[:count])
    rows = test.take(positions)

    def top1(name: str, severity: int) -> float:
        corrupted = corrupt(rows.images, name, severity, config.seed)
        return float((logits_of(apply, corrupted).argmax(axis=1) == rows.labels).mean())

    severities = config.corruption_severities
    top1s = {name: [top1(name, severity) for severity in severities] for name in CORRUPTIONS}
    return {
        "num_examples": count,
        "severities": list(severities),
        "clean_top1": float((logits[positions].argmax(axis=1) == rows.labels).mean()),
        "top1": top1s,
        "mean_top1": float(np.mean(list(top1s.values()))),
    }


def _slices(probabilities: np.ndarray, test: Rows | ShardedRows, confusion: Confusion, mistakes: int) -> dict[str, Any]:
    """The classes, rows and confusions that the report shows."""

    def rows(positions: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "row_id": int(test.row_ids[position]),
                "label": int(test.labels[position]),
                "predicted": int(probabilities[position].argmax()),
                "confidence": float(probabilities[position].max()),
            }
            for position in positions
        ]

    def classes(worst: bool) -> list[dict[str, Any]]:
        """The worst classes with their mistakes, or the best with their hits."""
        found = extreme_classes(confusion, EXTREME_CLASSES, worst=worst)
        for entry in found:
            positions = most_confident(
                probabilities, test.labels, PICTURES_PER_CLASS, right=not worst, label=entry["label"]
            )
            entry["examples"] = rows(positions)
        return found

    return {
        "worst_classes": classes(worst=True),
        "best_classes": classes(worst=False),
        "confident_mistakes": rows(most_confident(probabilities, test.labels, mistakes, right=False)),
        "confused_pairs": confused_pairs(confusion, CONFUSED_PAIRS),
    }


def _pictures(
    model: keras.Model, test: Rows | ShardedRows, probabilities: np.ndarray, found: dict[str, Any]
) -> dict[str, np.ndarray]:
    """`Evaluation.pictures`, for the rows that `_slices` has `found`."""
    hits = most_confident(probabilities, test.labels, len(test.labels), right=True)
    looked_at = different_classes(hits, test.labels, ATTENTION_IMAGES) if isinstance(model, Perceiver) else []
    named = [*found["confident_mistakes"]]
    named += [row for kind in ("worst_classes", "best_classes") for entry in found[kind] for row in entry["examples"]]
    positions = np.unique([*np.searchsorted(test.row_ids, [row["row_id"] for row in named]), *looked_at]).astype(int)
    rows = test.take(positions)
    # One image at a time: the maps of a large model, (iterations, heads, latents, rows, columns), take tens of MB each.
    maps = [attention_maps(model, rows.images[p : p + 1])[:, 0] for p in np.searchsorted(positions, looked_at)]
    pictures = {"row_ids": rows.row_ids, "images": rows.images, "labels": rows.labels}
    if maps:  # none if the model is no Perceiver, or classifies no row correctly
        latents = np.linspace(0, maps[0].shape[2] - 1, min(ATTENTION_LATENTS, maps[0].shape[2])).astype(int)
        pictures |= {
            "attention": np.stack([image.mean(axis=(1, 2)) for image in maps], axis=1),
            "attention_row_ids": test.row_ids[looked_at],
            "latent_attention": maps[0].mean(axis=1)[:, latents],
            "latents": latents,
        }
    return pictures
