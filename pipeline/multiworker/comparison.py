"""Whether two computations of a step found the same."""

import numpy as np

# Largest difference, relative to the largest number that is compared with it. The parts add up in another order.
TOLERANCE = 1e-3
# How many times the difference that rounding has been seen to make is allowed.
ROUNDING = 4.0

Found = dict[str, np.ndarray]
"""Values of a step by what they are."""


def difference(alone: Found, together: Found, parts: list[int], rounding: dict[str, float] | None = None) -> str:
    """The message about the first value that differs; empty if none does.

    Args:
        alone: What one process found.
        together: What the workers found.
        parts: The rows of each worker.
        rounding: By how much rounding is known to change a value.
    """
    gradients = [value for name, value in alone.items() if name.startswith("gradient")]
    largest = max(
        [float(np.max(np.abs(value), initial=0, where=np.isfinite(value))) for value in gradients], default=0.0
    )
    for name in [*alone, *(name for name in together if name not in alone)]:
        if name not in alone or name not in together:
            return _message(name, "nothing" if name not in alone else "a value", "the opposite", parts)
        one, several = alone[name], together[name]
        least = max(0.1 * largest, 1e-4) if name.startswith("gradient") else 0.1
        if one.shape != several.shape:
            return _message(name, f"of shape {one.shape}", f"of shape {several.shape}", parts)
        at = _where_different(one, several, least, ROUNDING * (rounding or {}).get(name, 0.0))
        if at is not None:
            return _message(name, _shown(one.flat[at]), _shown(several.flat[at]), parts)
    return ""


def largest_changes(first: Found, second: Found) -> dict[str, float]:
    """The largest change of an entry of each value that both have in the same shape."""
    return {
        name: float(np.max(_distances(value, second[name]), initial=0.0, where=np.isfinite(value.ravel())))
        for name, value in first.items()
        if np.issubdtype(value.dtype, np.number) and name in second and second[name].shape == value.shape
    }


def _distances(one: np.ndarray, several: np.ndarray) -> np.ndarray:
    """How far the entries lie apart; NaN and infinity are infinitely far from everything but themselves."""
    first, second = one.astype(np.float64).ravel(), several.astype(np.float64).ravel()
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        distances = np.where(same, 0.0, np.abs(first - second))
    return np.where(np.isnan(distances), np.inf, distances)


def _where_different(one: np.ndarray, several: np.ndarray, least: float, rounding: float) -> int | None:
    """Index of the entry that differs most, or None."""
    if np.array_equal(one, several):
        return None
    if not np.issubdtype(one.dtype, np.number):
        return int((one != several).argmax())
    with np.errstate(invalid="ignore", over="ignore"):
        if np.max(np.abs(one - several)) <= TOLERANCE * max(least, np.max(np.abs(one))) < np.inf:
            return None  # which is usual; a NaN is not, and is looked at below
    distances = _distances(one, several)
    finite = np.abs(one[np.isfinite(one)].astype(np.float64))
    scale = max(least, float(finite.max()) if finite.size else 0.0)
    worst = int(distances.argmax())
    return worst if distances[worst] > TOLERANCE * scale + rounding else None


def _shown(value: np.generic) -> str:
    return f"{value:.6g}" if isinstance(value, np.number) else str(value)


def _message(name: str, one: str, several: str, parts: list[int]) -> str:
    kind, _, of = name.partition(" ")
    return (
        f"the first step would differ from that of one process: {kind} {of} is {one} for the first {sum(parts)} rows "
        f"in one process, and {several} when the workers compute {', '.join(map(str, parts))} of the rows and are put "
        "together by their rows. A loss, metric or layer combines the rows of a batch in another way than by a mean "
        "over them, such as a sum, a maximum, a product of rows or a statistic of the batch: make it a mean over rows, "
        "give the optimizer global_clipnorm or clipnorm instead of clipping gradients in the step, or turn the "
        "comparison off with multiworker.enable(model, check=False) if the difference is intended"
    )
