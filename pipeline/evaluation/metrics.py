"""Metrics of logits, and which classes and rows a report shows as the best, the worst and the most confidently wrong.

Two metrics are not scikit-learn's: of equal logits its top-k accuracy prefers the last class, so that a model with
constant logits can score better than chance, and its log loss clips probabilities, so that it underestimates a
confident mistake.
"""

from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import scipy.special


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities float32 (N, K) of logits (N, K) that are divided by `temperature` first."""
    return scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1).astype(np.float32)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log-probability of the labels, in nats; logits are divided by `temperature` first."""
    log_probabilities = scipy.special.log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Number of classes ranked before the label, int (N,); 0 is a hit. Equal logits rank in order of their classes."""
    label = labels[:, np.newaxis].astype(np.int64)
    of_label = np.take_along_axis(logits, label, axis=1)
    before = np.arange(logits.shape[1]) < label
    return ((logits > of_label) | ((logits == of_label) & before)).sum(axis=1)


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, mean recall over the classes that have rows, cross-entropy and number of rows.

    Args:
        logits: (N, K).
        labels: (N,) integers.

    Raises:
        ValueError: if a logit is not finite; no logit compares as greater than NaN, so the row would count as a hit.
    """
    if not (finite := np.isfinite(logits).all(axis=1)).all():
        raise ValueError(f"the model gives {(~finite).sum()} of {len(labels)} images no finite logits")
    rank = ranks(logits, labels)
    rows, hits = np.bincount(labels), np.bincount(labels, weights=rank == 0)
    return {
        "top1": float((rank == 0).mean()),
        "top5": float((rank < 5).mean()),
        "balanced_accuracy": float((hits[rows > 0] / rows[rows > 0]).mean()),
        "loss": cross_entropy(logits, labels),
        "num_examples": len(labels),
    }


Confusion: TypeAlias = np.ndarray | scipy.sparse.csr_array
"""int (K, K), number of rows by label (first axis) and predicted class."""


def confusion_of(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> scipy.sparse.csr_array:
    """The confusion matrix, which holds no zeros: of 20,000 classes they would take gigabytes."""
    ones, shape = np.ones(len(labels), np.int64), (num_classes, num_classes)
    return scipy.sparse.coo_array((ones, (labels, predicted)), shape).tocsr()


def recalls(confusion: Confusion) -> list[float | None]:
    """Share of hits among the rows of each class; None for a class without rows."""
    table = scipy.sparse.csr_array(confusion)
    counts = zip(table.diagonal().tolist(), table.sum(axis=1).tolist(), strict=True)
    return [hits / rows if rows else None for hits, rows in counts]


def superclass_of_class(labels: np.ndarray, coarse_labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Superclass of each class, int64 (K,), derived from the labels of the rows; -1 of a class without rows.

    Raises:
        ValueError: if a class has rows of several superclasses.
    """
    found = np.full(num_classes, -1)
    found[labels] = coarse_labels
    if (wrong := np.flatnonzero(found[labels] != coarse_labels)).size:
        raise ValueError(f"rows of class {labels[wrong[0]]} belong to several superclasses")
    return found


def confused_pairs(confusion: Confusion, count: int) -> list[dict[str, int]]:
    """The `count` most frequent mistakes, the most frequent first: `{label, predicted, rows}`."""
    table = scipy.sparse.csr_array(confusion).tocoo()
    wrong = (table.row != table.col) & (table.data > 0)
    label, predicted, rows = table.row[wrong], table.col[wrong], table.data[wrong]
    order = np.lexsort((predicted, label, -rows))[:count]
    return [{"label": int(label[i]), "predicted": int(predicted[i]), "rows": int(rows[i])} for i in order]


def extreme_classes(confusion: Confusion, count: int, *, worst: bool) -> list[dict[str, Any]]:
    """The `count` classes with the lowest, or the highest, recall among those with rows: `{label, accuracy, rows}`."""
    known = [(recall, label) for label, recall in enumerate(recalls(confusion)) if recall is not None]
    known.sort(key=lambda pair: (pair[0] if worst else -pair[0], pair[1]))
    rows = scipy.sparse.csr_array(confusion).sum(axis=1)
    return [{"label": label, "accuracy": value, "rows": int(rows[label])} for value, label in known[:count]]


def most_confident(
    probabilities: np.ndarray, labels: np.ndarray, count: int, *, right: bool, label: int | None = None
) -> list[int]:
    """Positions of the rows that are classified correctly (or wrongly), the most confident first.

    Args:
        probabilities: (N, K).
        labels: (N,) integers.
        count: Number of positions, at most.
        right: True for hits, False for mistakes.
        label: Only rows of this class; None for all rows.
    """
    chosen = (probabilities.argmax(axis=1) == labels) == right
    if label is not None:
        chosen &= labels == label
    positions = np.flatnonzero(chosen)
    order = np.argsort(-probabilities[positions].max(axis=1), kind="stable")[:count]
    return [int(position) for position in positions[order]]


def different_classes(positions: list[int], labels: np.ndarray, count: int) -> list[int]:
    """The first `count` of `positions`, where a class is repeated only after each class has had its first row."""
    _, first = np.unique(labels[np.array(positions, int)], return_index=True)
    rest = np.setdiff1d(np.arange(len(positions)), first, assume_unique=True)
    return [positions[place] for place in (*np.sort(first), *rest)[:count]]
