"""Whether a classifier is right as often as it says: expected calibration error, and temperature scaling.

After Guo et al., "On Calibration of Modern Neural Networks" (arXiv:1706.04599).
"""

from typing import Any

import numpy as np

from pipeline.metrics import softmax

TEMPERATURES = (0.1, 10.0)
"""Where a temperature is looked for. Rows that are all classified rightly would have one of zero."""
_TOLERANCE = 1e-6


def reliability(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> dict[str, Any]:
    """Confidence held against accuracy.

    Args:
        probabilities: (N, K).
        labels: (N,) integers.
        num_bins: of equal width over [0, 1]; a confidence on an edge belongs to the lower bin.

    Returns:
        `ece`, the mean of |accuracy - confidence| over the bins weighted by rows; and `bins`, of each
        `{lower, upper, rows, confidence, accuracy}`, the last two None where a bin is empty.
    """
    confidence, hit = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
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
    """The temperature within `TEMPERATURES` by which logits are divided for the smallest cross-entropy.

    The cross-entropy is convex in the inverse temperature b, and its derivative is the mean of E[logit] - logit of the
    right class, the expectation over the probabilities at b: bisection finds where that is zero.

    Args:
        logits: (N, K), of rows that neither trained the model nor judge it.
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
