"""Checks that what a model gives are probabilities of its classes, which no file of a model of one's own says."""

from typing import Any

import numpy as np

MOST_DEVIATION = 1e-2
"""Of the sum of a row from 1: 16-bit numbers round as much."""


def checked(given: Any, rows: int, names: int, uri: str) -> np.ndarray:
    """What a model gives for `rows` images, as an array (rows, names).

    A row with a number that is not finite is left to the caller, since it is an error of one image.

    Raises:
        ValueError: If it has another shape, or other rows that are no probabilities.
    """
    found = np.asarray(given)
    if found.shape != (rows, names) or found.dtype.kind not in "fiub":
        raise ValueError(
            f"model = {uri!r}: gives {found.dtype} {found.shape} for {rows} {'image' if rows == 1 else 'images'} and "
            f"{names} label_names: let it give one array of numbers {(rows, names)}, the probabilities of the classes"
        )
    finite = found[np.isfinite(found).all(axis=1)].astype(np.float64)
    sums = finite.sum(axis=1)
    wrong = (finite < 0).any(axis=1) | (abs(sums - 1) > MOST_DEVIATION)
    if wrong.any():
        row = wrong.argmax()
        raise ValueError(
            f"model = {uri!r}: gives numbers that are no probabilities: those of an image are {finite[row].min():.4g} "
            f"to {finite[row].max():.4g}, with the sum {sums[row]:.4g}: end the model in a softmax"
        )
    return found
