"""What a trained model makes of the test split: how good, how sure, how robust, how quick, and where it errs.

`evaluate` is the whole; nothing in it knows of tasks or of storage.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perceiver.model import Perceiver, attention_maps
from pipeline import calibration, slices
from pipeline.batches import ImageArrays
from pipeline.config import EvaluationConfig
from pipeline.corruptions import CORRUPTIONS, corrupt
from pipeline.metrics import (
    confused_pairs,
    confusion_matrix,
    cross_entropy,
    recalls,
    scores,
    softmax,
    superclass_of_class,
)
from pipeline.predictions import Predictions

BATCH_SIZE = 256
WARM_UP_CALLS = 5
EXTREME_CLASSES = 5
"""So many of the worst and of the best classes are shown with pictures,"""
PICTURES_PER_CLASS = 6
"""so many each."""
CONFUSED_PAIRS = 20
ATTENTION_IMAGES = 6
"""Images whose attention maps are kept,"""
ATTENTION_LATENTS = 8
"""and, of the first of them, so many single latents."""

Apply = Callable[[np.ndarray], np.ndarray]
"""uint8 images (N, H, W, C) to logits float32 (N, K)."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: JSON-able; docs/evaluation.md says what is in it.
        test, validation: logits of all rows.
        pictures: arrays for the report: `row_ids` (P,), `images` (P, H, W, C) and `labels` (P,) of the rows that
            `results` names or whose attention is shown; `attention` float32 (iterations, A, rows, columns), the mean
            over heads and latents for the rows `attention_row_ids` (A,); `latent_attention` float32 (iterations, L,
            rows, columns), single latents `latents` (L,) of the first of these rows, the mean over heads.
    """

    results: dict[str, Any]
    test: Predictions
    validation: Predictions
    pictures: dict[str, np.ndarray]


def compiled(model: keras.Model, image_shape: tuple[int, ...]) -> Apply:
    """A model of uint8 images to logits as one graph for all batch sizes, as the exported model runs it."""
    signature = [tf.TensorSpec((None, *image_shape), tf.uint8)]
    graph = tf.function(lambda images: model(images, training=False), input_signature=signature)
    return lambda images: graph(tf.constant(images)).numpy()


def logits_of(apply: Apply, images: np.ndarray) -> np.ndarray:
    """Logits float32 (N, K) of uint8 images (N, H, W, C), in order."""
    return np.concatenate([apply(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)])


def evaluate(
    model: Perceiver,
    test: ImageArrays,
    validation: ImageArrays,
    config: EvaluationConfig,
    label_names: list[str],
    coarse_label_names: list[str] | None = None,
) -> Evaluation:
    """Judges a model by the test rows; the validation rows only find the temperature.

    Args:
        model: uint8 images to logits.
        label_names: of the K classes.
        coarse_label_names: of the superclasses, where the data have them.

    Raises:
        ValueError: if a logit is not finite.
    """
    apply = compiled(model, test.images.shape[1:])
    logits, validation_logits = logits_of(apply, test.images), logits_of(apply, validation.images)
    validation_scores, test_scores = scores(validation_logits, validation.labels), scores(logits, test.labels)
    temperature = calibration.fit_temperature(validation_logits, validation.labels)
    probabilities = softmax(logits, temperature)
    confusion = confusion_matrix(test.labels, logits.argmax(axis=1), len(label_names))
    results = {
        "label_names": label_names,
        "coarse_label_names": coarse_label_names,
        "test": test_scores,
        "validation": validation_scores,
        "per_class": recalls(confusion),
        "confusion": confusion.tolist(),
        "superclasses": _superclasses(logits, test, len(label_names)) if test.coarse_labels is not None else None,
        "calibration": {
            "num_bins": config.calibration_bins,
            "temperature": temperature,
            "loss_before": test_scores["loss"],
            "loss_after": cross_entropy(logits, test.labels, temperature),
            "before": calibration.reliability(softmax(logits), test.labels, config.calibration_bins),
            "after": calibration.reliability(probabilities, test.labels, config.calibration_bins),
        },
        "robustness": _robustness(apply, test, logits, config) if config.corruption_rows else None,
        "speed": measure_speed(apply, test.images, config.latency_calls),
        "slices": _slices(probabilities, test, confusion, config.confident_mistakes),
    }
    return Evaluation(
        results,
        Predictions(test.row_ids, test.labels, logits),
        Predictions(validation.row_ids, validation.labels, validation_logits),
        _pictures(model, test, probabilities, results["slices"]),
    )


def measure_speed(apply: Apply, images: np.ndarray, calls: int) -> dict[str, Any]:
    """Milliseconds of a call with one image (median and 95th percentile), and images/s in batches of `BATCH_SIZE`.

    From arrays in memory to arrays in memory, after `WARM_UP_CALLS`.
    """
    batch = np.resize(images, (BATCH_SIZE, *images.shape[1:]))
    single = [1000 * seconds for seconds in _seconds(apply, images[:1], calls)]
    batched = _seconds(apply, batch, max(3, calls // 20))
    return {
        "batch_1_median_ms": float(np.median(single)),
        "batch_1_p95_ms": float(np.percentile(single, 95)),
        "batch_256_images_per_second": float(BATCH_SIZE / np.median(batched)),
        "device": "GPU" if tf.config.list_physical_devices("GPU") else f"CPU, {len(os.sched_getaffinity(0))} cores",
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


def _superclasses(logits: np.ndarray, test: ImageArrays, num_classes: int) -> dict[str, Any]:
    """A prediction's superclass is that of the predicted class."""
    assert test.coarse_labels is not None
    of_class = superclass_of_class(test.labels, test.coarse_labels, num_classes)
    predicted = logits.argmax(axis=1)
    confusion = confusion_matrix(test.coarse_labels, of_class[predicted], int(of_class.max()) + 1)
    hit = predicted == test.labels
    return {
        "of_class": of_class.tolist(),
        "top1": float((of_class[predicted] == test.coarse_labels).mean()),
        "confusion": confusion.tolist(),
        "per_superclass": recalls(confusion),
        # Of the rows of a superclass, those whose very class was found.
        "class_top1": [float(hit[test.coarse_labels == s].mean()) for s in range(len(confusion))],
    }


def _robustness(apply: Apply, test: ImageArrays, logits: np.ndarray, config: EvaluationConfig) -> dict[str, Any]:
    """Top-1 on corrupted copies of a random subset, and on the same rows as they are."""
    count = min(config.corruption_rows, len(test.labels))
    rows = np.sort(np.random.default_rng(config.seed).permutation(len(test.labels))[:count])
    images, labels = test.images[rows], test.labels[rows]

    def top1(name: str, severity: int) -> float:
        corrupted = corrupt(images, name, severity, config.seed)
        return float((logits_of(apply, corrupted).argmax(axis=1) == labels).mean())

    severities = config.corruption_severities
    top1s = {name: [top1(name, severity) for severity in severities] for name in CORRUPTIONS}
    return {
        "num_examples": count,
        "severities": list(severities),
        "clean_top1": float((logits[rows].argmax(axis=1) == labels).mean()),
        "top1": top1s,
        "mean_top1": float(np.mean(list(top1s.values()))),
    }


def _slices(probabilities: np.ndarray, test: ImageArrays, confusion: np.ndarray, mistakes: int) -> dict[str, Any]:
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
        """With the mistakes of the worst, and the hits of the best."""
        found = slices.extreme_classes(confusion, EXTREME_CLASSES, worst=worst)
        for entry in found:
            positions = slices.most_confident(
                probabilities, test.labels, PICTURES_PER_CLASS, right=not worst, label=entry["label"]
            )
            entry["examples"] = rows(positions)
        return found

    return {
        "worst_classes": classes(worst=True),
        "best_classes": classes(worst=False),
        "confident_mistakes": rows(slices.most_confident(probabilities, test.labels, mistakes, right=False)),
        "confused_pairs": confused_pairs(confusion, CONFUSED_PAIRS),
    }


def _pictures(
    model: Perceiver, test: ImageArrays, probabilities: np.ndarray, found: dict[str, Any]
) -> dict[str, np.ndarray]:
    hits = slices.most_confident(probabilities, test.labels, len(test.labels), right=True)
    looked_at = slices.different_classes(hits, test.labels, ATTENTION_IMAGES)
    named = [*found["confident_mistakes"]]
    named += [row for kind in ("worst_classes", "best_classes") for entry in found[kind] for row in entry["examples"]]
    positions = np.unique([*np.searchsorted(test.row_ids, [row["row_id"] for row in named]), *looked_at]).astype(int)
    # An image at a time: the maps of a large model take tens of MB each. (iterations, heads, latents, rows, columns)
    maps = [attention_maps(model, test.images[p : p + 1])[:, 0] for p in looked_at]
    pictures = {
        "row_ids": test.row_ids[positions],
        "images": test.images[positions],
        "labels": test.labels[positions],
    }
    if maps:  # a model that hits nothing has none
        latents = np.linspace(0, maps[0].shape[2] - 1, min(ATTENTION_LATENTS, maps[0].shape[2])).astype(int)
        pictures |= {
            "attention": np.stack([image.mean(axis=(1, 2)) for image in maps], axis=1),
            "attention_row_ids": test.row_ids[looked_at],
            "latent_attention": maps[0].mean(axis=1)[:, latents],
            "latents": latents,
        }
    return pictures
