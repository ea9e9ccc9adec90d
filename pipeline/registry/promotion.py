"""The rules by which a version of the registered model becomes the champion. Does not use MLflow.

A version has to be within the limits and to beat the champion on the same test rows: its top-1 accuracy has to be
higher in nearly all bootstrap samples of these rows. Both models classify every row, so the comparison is paired.
`scipy.stats.bootstrap` is not used: it draws every row of every sample, which takes far longer (see `bootstrap_share`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.registry.config import PromotionConfig

BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class Evidence:
    """What a version is judged by.

    Attributes:
        test_digest: SHA-256 of the test rows.
        row_ids: Ids of the test rows, int64 (N,), ascending.
        hits: Whether the class of each row was predicted correctly, bool (N,).
        calibration_error: Expected calibration error after temperature scaling.
        latency_ms: Median time for one image, in milliseconds.
    """

    test_digest: str
    row_ids: np.ndarray
    hits: np.ndarray
    calibration_error: float
    latency_ms: float

    @property
    def top1(self) -> float:
        return float(self.hits.mean())


@dataclass(frozen=True)
class Candidate:
    """A version, by its number, and its evidence."""

    version: int
    evidence: Evidence


@dataclass(frozen=True)
class Decision:
    """Result of `decide`.

    Attributes:
        champion: The version that gets the alias.
        reasons: For each contender, why it became the champion or not.
    """

    champion: int
    reasons: dict[int, str]


def decide(
    incumbent: Candidate | int | None, contenders: Sequence[Candidate], config: PromotionConfig, seed: int = 0
) -> Decision:
    """Chooses the champion. The result does not depend on the order of the contenders.

    Each contender in turn is compared with the current champion and replaces it if it wins, the most accurate first:
    the best of those that beat the incumbent wins. Without an incumbent, the best contender within the limits becomes
    the champion, or the best of all if none is within the limits: there is always a champion.

    Args:
        incumbent: The champion so far; its version number alone if it has no evidence; None if there is no champion.
        contenders: Versions other than the incumbent.

    Raises:
        ValueError: If there is neither an incumbent nor a contender.
    """
    champion, reasons = incumbent, {}
    ranked = sorted(contenders, key=lambda c: (-c.evidence.top1, c.version))
    if champion is None:
        if not ranked:
            raise ValueError("there is neither a champion nor a contender")
        within = [candidate for candidate in ranked if not objections(candidate.evidence, config)]
        champion = (within or ranked)[0]
        reason = "there was no champion, and there has to be one"
        reasons[champion.version] = "; ".join([reason, *objections(champion.evidence, config)])
    for candidate in ranked:
        if candidate is champion:
            continue
        wins, comparison = _beats(candidate.evidence, champion, config, seed)
        against = objections(candidate.evidence, config)
        reasons[candidate.version] = "; ".join([*against, comparison])
        if wins and not against:
            champion = candidate
    return Decision(champion if isinstance(champion, int) else champion.version, reasons)


def objections(evidence: Evidence, config: PromotionConfig) -> list[str]:
    """A sentence for each limit that is exceeded."""
    found = []
    # Written so that NaN exceeds every limit.
    if not evidence.calibration_error <= config.max_calibration_error:
        found.append(
            f"calibration error {evidence.calibration_error:.4f} is above the limit of {config.max_calibration_error}"
        )
    if not evidence.latency_ms <= config.max_latency_ms:
        found.append(f"latency {evidence.latency_ms:.1f} ms is above the limit of {config.max_latency_ms} ms")
    return found


def bootstrap_share(hits: np.ndarray, other_hits: np.ndarray, min_gain: float, seed: int) -> float:
    """Share of bootstrap samples in which `hits` has more than `min_gain` more accuracy than `other_hits`.

    The difference of the two is -1, 0 or 1 for each row. In a sample of rows with replacement, the counts of these
    values have a multinomial distribution, so the three counts are drawn instead of the rows.

    Args:
        hits, other_hits: bool (N,), for the same rows.
    """
    difference = hits.astype(int) - other_hits.astype(int)
    shares = [(difference == value).mean() for value in (1, 0, -1)]
    samples = np.random.default_rng(seed).multinomial(len(hits), shares, BOOTSTRAP_SAMPLES)
    # Compared as counts of rows, with a margin for rounding: a gain of exactly `min_gain` does not exceed it.
    return float((samples[:, 0] - samples[:, 2] > min_gain * len(hits) + 1e-6).mean())


def _beats(evidence: Evidence, champion: Candidate | int, config: PromotionConfig, seed: int) -> tuple[bool, str]:
    """Whether the evidence shows more accuracy than that of the champion, and a sentence that explains the result."""
    if isinstance(champion, int):
        return False, f"version {champion}, the champion, has no test predictions to compare with"
    version, other = champion.version, champion.evidence
    if evidence.test_digest != other.test_digest or not np.array_equal(evidence.row_ids, other.row_ids):
        return False, (
            f"tested on other rows ({evidence.test_digest[:12]}) than version {version}, the champion "
            f"({other.test_digest[:12]}): the two cannot be compared"
        )
    share = bootstrap_share(evidence.hits, other.hits, config.min_gain, seed)
    gain = f" by more than {config.min_gain}" if config.min_gain else ""
    return share >= config.confidence, (
        f"top-1 {evidence.top1:.4f} against {other.top1:.4f} of version {version}: better{gain} in {share:.1%} of "
        f"{BOOTSTRAP_SAMPLES:,} bootstrap samples of {len(evidence.hits)} test rows, {config.confidence:.0%} required"
    )
