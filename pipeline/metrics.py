"""How good logits are: accuracy, loss, and which classes are taken for which; NumPy only."""

from typing import Any

import numpy as np


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities float64 (N, K) of logits (N, K) that are divided by `temperature` first."""
    scaled = logits.astype(np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities float32 (N, K); see `log_softmax`."""
    return np.exp(log_softmax(logits, temperature)).astype(np.float32)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log-probability, in nats, of the right class."""
    return float(-log_softmax(logits, temperature)[np.arange(len(labels)), labels].mean())


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one, int (N,): 0 is a hit. Of equal ones the first comes first."""
    label = labels[:, np.newaxis].astype(np.int64)
    of_label = np.take_along_axis(logits, label, axis=1)
    before = np.arange(logits.shape[1]) < label
    return ((logits > of_label) | ((logits == of_label) & before)).sum(axis=1)


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, cross-entropy and number of rows.

    Args:
        logits: (N, K).
        labels: (N,) integers.

    Raises:
        ValueError: if a logit is not finite; any comparison with it would count as a hit.
    """
    if not (finite := np.isfinite(logits).all(axis=1)).all():
        raise ValueError(f"the model gives {(~finite).sum()} of {len(labels)} images no finite logits")
    rank = ranks(logits, labels)
    return {
        "top1": float((rank == 0).mean()),
        "top5": float((rank < 5).mean()),
        "loss": cross_entropy(logits, labels),
        "num_examples": len(labels),
    }


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Number of rows by right class (first axis) and predicted class, int64 (K, K)."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def recalls(confusion: np.ndarray) -> list[float | None]:
    """Share of hits among the rows of each class; None for a class without rows."""
    return [float(row[k] / row.sum()) if row.sum() else None for k, row in enumerate(confusion)]


def superclass_of_class(labels: np.ndarray, coarse_labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Superclass of each class, int64 (K,), as the rows have it.

    Raises:
        ValueError: if a class has no row, or rows of several superclasses.
    """
    found = np.full(num_classes, -1)
    found[labels] = coarse_labels
    if (missing := np.flatnonzero(found < 0)).size:
        raise ValueError(f"no row of class {missing[0]} says to which superclass it belongs")
    if (wrong := np.flatnonzero(found[labels] != coarse_labels)).size:
        raise ValueError(f"rows of class {labels[wrong[0]]} belong to several superclasses")
    return found


def confused_pairs(confusion: np.ndarray, count: int) -> list[dict[str, int]]:
    """The `count` most frequent mistakes, the most frequent first: `{label, predicted, rows}`."""
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, mistakes.shape), strict=True)
    return [
        {"label": int(label), "predicted": int(predicted), "rows": int(mistakes[label, predicted])}
        for label, predicted in pairs
        if mistakes[label, predicted]
    ]
