"""Which rows are worth a look: those of the worst and best classes, and the most confident mistakes."""

from typing import Any

import numpy as np

from pipeline.metrics import recalls


def extreme_classes(confusion: np.ndarray, count: int, *, worst: bool) -> list[dict[str, Any]]:
    """The classes with the lowest, or the highest, share of hits, of those with rows: `{label, accuracy, rows}`."""
    accuracy = recalls(confusion)
    known = [(value, label) for label, value in enumerate(accuracy) if value is not None]
    known.sort(key=lambda pair: (pair[0] if worst else -pair[0], pair[1]))
    return [{"label": label, "accuracy": value, "rows": int(confusion[label].sum())} for value, label in known[:count]]


def most_confident(
    probabilities: np.ndarray, labels: np.ndarray, count: int, *, right: bool, label: int | None = None
) -> list[int]:
    """Positions of the rows that are classified rightly (or wrongly), the most confident first.

    Args:
        probabilities: (N, K).
        labels: (N,) integers.
        count: at most so many.
        right: whether hits or mistakes.
        label: only rows of this class; of all if None.
    """
    chosen = (probabilities.argmax(axis=1) == labels) == right
    if label is not None:
        chosen &= labels == label
    positions = np.flatnonzero(chosen)
    order = np.argsort(-probabilities[positions].max(axis=1), kind="stable")[:count]
    return [int(position) for position in positions[order]]


def different_classes(positions: list[int], labels: np.ndarray, count: int) -> list[int]:
    """The first `count` of `positions`, no class twice as long as there are others."""
    first = [p for i, p in enumerate(positions) if labels[p] not in labels[positions[:i]]]
    return (first + [p for p in positions if p not in first])[:count]
