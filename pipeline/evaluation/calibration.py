"""Calibration of a classifier: expected calibration error and temperature scaling (Guo et al., arXiv:1706.04599).

scikit-learn is not used: its temperature scaling needs an estimator around the logits and allows temperatures down to
e^-10, and its `calibration_curve` omits empty bins and the number of rows of the others.
"""

from typing import Any

import numpy as np

from pipeline.evaluation.metrics import softmax

TEMPERATURES = (0.1, 10.0)
"""Bounds of a fitted temperature. Without them, rows without a mistake would be given a temperature of zero."""
_TOLERANCE = 1e-6


def reliability(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> dict[str, Any]:
    """Compares confidence with accuracy.

    Args:
        probabilities: (N, K).
        labels: (N,) integers.
        num_bins: Number of bins of equal width over [0, 1]; a confidence on an edge belongs to the lower bin.

    Returns:
        `ece`, the mean of |accuracy - confidence| over the bins weighted by their rows; and `bins`, for each bin
        `{lower, upper, rows, confidence, accuracy}`, the last two None where the bin is empty.
    """
    confidence, hit = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    bin_of = np.searchsorted(edges[1:-1], confidence)
    rows = np.bincount(bin_of, minlength=num_bins)
    confidences = np.bincount(bin_of, confidence, num_bins)
    hits = np.bincount(bin_of, hit, num_bins)
    return {
        "ece": float(np.abs(hits - confidences).sum() / len(labels)),
        "bins": [
            {
                "lower": float(edges[b]),
                "upper": float(edges[b + 1]),
                "rows": int(rows[b]),
                "confidence": float(confidences[b] / rows[b]) if rows[b] else None,
                "accuracy": float(hits[b] / rows[b]) if rows[b] else None,
            }
            for b in range(num_bins)
        ],
    }


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature within `TEMPERATURES` that minimises the cross-entropy of logits divided by it.

    The cross-entropy is convex in the inverse temperature b. Its derivative is the mean of E[logit] - logit of the
    label, with the expectation over the probabilities at b; bisection finds its root.

    Args:
        logits: (N, K), of rows that are used neither for training nor for testing.
        labels: (N,) integers.
    """
    logits = logits.astype(np.float64)
    of_label = logits[np.arange(len(labels)), labels]
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        slope = ((softmax(logits, 1 / middle) * logits).sum(axis=1) - of_label).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(2 / (low + high))
