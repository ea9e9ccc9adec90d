"""Whether a new version of the registered model becomes the champion; knows nothing of MLflow.

A version has to be within the limits, and to beat the champion on the same test rows: more top-1 accuracy, in nearly
all bootstrap samples of these rows. Both models see every row, so the comparison is paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class PromotionConfig:
    """When a new version of the registered model becomes the champion."""

    min_gain: float = 0.0
    """Gain in top-1 accuracy over the champion that a new version has to exceed."""
    confidence: float = 0.95
    """Share of bootstrap samples of the test rows in which it has to do so."""
    max_calibration_error: float = 0.1
    """Largest expected calibration error on the test rows, after temperature scaling."""
    max_latency_ms: float = 250.0
    """Longest median time of a prediction for one image, in milliseconds."""

    def __post_init__(self) -> None:
        for name, right, remedy in (
            ("min_gain", 0 <= self.min_gain < 1, "give 0 or more, below 1"),
            ("confidence", 0.5 <= self.confidence < 1, "give 0.5 or more, below 1"),
            ("max_calibration_error", 0 < self.max_calibration_error <= 1, "give a share above 0, at most 1"),
            ("max_latency_ms", self.max_latency_ms > 0, "give a positive number"),
        ):
            if not right:
                raise ValueError(f"promotion.{name} = {getattr(self, name)}: {remedy}")


@dataclass(frozen=True)
class Candidate:
    """A version and what is known of it.

    Attributes:
        version: its number.
        test_digest: SHA-256 of the test rows.
        row_ids: int64 (N,), of the test rows, ascending.
        hits: bool (N,), whether the class was found.
        calibration_error: expected calibration error after temperature scaling.
        latency_ms: median time for one image.
    """

    version: int
    test_digest: str
    row_ids: np.ndarray
    hits: np.ndarray
    calibration_error: float
    latency_ms: float

    @property
    def top1(self) -> float:
        return float(self.hits.mean())


@dataclass(frozen=True)
class Decision:
    """Attributes: champion: version that is to hold the alias. reasons: of each contender, why it does or does not."""

    champion: int
    reasons: dict[int, str]


def decide(
    incumbent: Candidate | int | None, contenders: Sequence[Candidate], config: PromotionConfig, seed: int = 0
) -> Decision:
    """Which version is the champion; the same whatever the order in which the contenders are given.

    The contenders are held against the champion one after another, the one with the highest accuracy first, so that of
    several that beat the incumbent the best wins. Where there is no champion, the best of those within the limits is,
    or of all if none is: there shall be one.

    Args:
        incumbent: the champion so far; only its number where it has no test predictions; None if there is none.
        contenders: versions other than the incumbent.
    """
    champion, reasons = incumbent, {}
    ranked = sorted(contenders, key=lambda c: (-c.top1, c.version))
    if champion is None:
        if not ranked:
            raise ValueError("there is neither a champion nor a contender")
        within = [candidate for candidate in ranked if not objections(candidate, config)]
        champion = (within or ranked)[0]
        reason = "there was no champion, and there has to be one"
        reasons[champion.version] = "; ".join([reason, *objections(champion, config)])
    for candidate in ranked:
        if candidate is champion:
            continue
        beaten, because = _beats(candidate, champion, config, seed)
        against = objections(candidate, config)
        reasons[candidate.version] = "; ".join([*against, because])
        if beaten and not against:
            champion = candidate
    return Decision(champion if isinstance(champion, int) else champion.version, reasons)


def objections(candidate: Candidate, config: PromotionConfig) -> list[str]:
    """Limits that the candidate does not keep, in words."""
    found = []
    # A value that is not a number keeps no limit.
    if not candidate.calibration_error <= config.max_calibration_error:
        found.append(
            f"calibration error {candidate.calibration_error:.4f} is above the limit of {config.max_calibration_error}"
        )
    if not candidate.latency_ms <= config.max_latency_ms:
        found.append(f"latency {candidate.latency_ms:.1f} ms is above the limit of {config.max_latency_ms} ms")
    return found


def bootstrap_share(hits: np.ndarray, other_hits: np.ndarray, min_gain: float, seed: int) -> float:
    """Share of bootstrap samples of the rows in which `hits` has more than `min_gain` more accuracy than `other_hits`.

    A row makes a difference of -1, 0 or 1. How often each comes in a sample of rows with replacement is multinomial, so
    drawing these three numbers is drawing the rows.

    Args:
        hits, other_hits: bool (N,), of the same rows.
    """
    difference = hits.astype(int) - other_hits.astype(int)
    shares = [(difference == value).mean() for value in (1, 0, -1)]
    samples = np.random.default_rng(seed).multinomial(len(hits), shares, BOOTSTRAP_SAMPLES)
    # Counted in rows, with room for rounding: a gain of just `min_gain` is not more.
    return float((samples[:, 0] - samples[:, 2] > min_gain * len(hits) + 1e-6).mean())


def _beats(candidate: Candidate, champion: Candidate | int, config: PromotionConfig, seed: int) -> tuple[bool, str]:
    """Whether the candidate is better than the champion beyond doubt, and that in words."""
    if isinstance(champion, int):
        return False, f"version {champion}, the champion, has no test predictions to compare with"
    if candidate.test_digest != champion.test_digest or not np.array_equal(candidate.row_ids, champion.row_ids):
        return False, (
            f"tested on other rows ({candidate.test_digest[:12]}) than version {champion.version}, the champion "
            f"({champion.test_digest[:12]}): the two cannot be compared"
        )
    share = bootstrap_share(candidate.hits, champion.hits, config.min_gain, seed)
    gain = f" by more than {config.min_gain}" if config.min_gain else ""
    return share >= config.confidence, (
        f"top-1 {candidate.top1:.4f} against {champion.top1:.4f} of version {champion.version}: better{gain} in "
        f"{share:.1%} of {BOOTSTRAP_SAMPLES:,} bootstrap samples of {len(candidate.hits)} test rows, wanted are "
        f"{config.confidence:.0%}"
    )
