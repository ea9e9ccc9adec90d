"""The rules of promotion by themselves, on numbers that can be checked by counting."""

from itertools import permutations

import numpy as np
import pytest

from pipeline.registry.config import PromotionConfig
from pipeline.registry.promotion import Candidate, Evidence, bootstrap_share, decide

ROWS = 1000
LIMITS = PromotionConfig(max_calibration_error=0.1, max_latency_ms=100.0)


def candidate(version: int, hits: int, *, digest: str = "d" * 64, error: float = 0.02, latency: float = 5) -> Candidate:
    """A version that classifies the first `hits` of 1,000 rows correctly."""
    return Candidate(version, Evidence(digest, np.arange(ROWS), np.arange(ROWS) < hits, error, latency))


def test_the_share_is_that_of_resampled_rows() -> None:
    random = np.random.default_rng(0)
    mine, other = random.random(200) < 0.6, random.random(200) < 0.55
    rows = random.integers(0, 200, (20_000, 200))
    gains = mine[rows].sum(axis=1) - other[rows].sum(axis=1)
    for rows_gained in (0, 10):
        share = bootstrap_share(mine, other, rows_gained / 200, seed=1)
        assert share == pytest.approx((gains > rows_gained).mean(), abs=0.015)
    assert bootstrap_share(mine, mine, 0.0, seed=1) == 0.0
    assert bootstrap_share(mine, other, 0.0, seed=1) == bootstrap_share(mine, other, 0.0, seed=1)


def test_the_gain_has_to_exceed_the_minimum() -> None:
    champion, better = candidate(1, 700), candidate(2, 750)
    assert decide(champion, [better], PromotionConfig(min_gain=0.03)).champion == 2
    decision = decide(champion, [better], PromotionConfig(min_gain=0.05))
    assert decision.champion == 1
    assert "better by more than 0.05 in 4" in decision.reasons[2]  # 46 to 49 of 100 samples of a gain of 0.05


def test_a_gain_within_chance_is_not_enough() -> None:
    lucky = np.arange(ROWS) < 700
    lucky[[0, 1, 2, *range(700, 705)]] = [False] * 3 + [True] * 5
    contender = Candidate(2, Evidence("d" * 64, np.arange(ROWS), lucky, 0.02, 5.0))
    assert contender.evidence.top1 > 0.7
    assert decide(candidate(1, 700), [contender], LIMITS).champion == 1


def test_the_best_of_several_wins_in_any_order() -> None:
    contenders = [candidate(2, 740), candidate(3, 760), candidate(4, 755), candidate(5, 800, latency=101)]
    for order in permutations(contenders):
        decision = decide(candidate(1, 700), order, LIMITS)
        assert decision.champion == 3
        assert sorted(decision.reasons) == [2, 3, 4, 5]
        assert "of version 3" in decision.reasons[4]
        assert "latency 101.0 ms is above the limit of 100.0 ms" in decision.reasons[5]


def test_there_is_a_champion_even_if_none_is_within_the_limits() -> None:
    decision = decide(None, [candidate(1, 500, error=0.2), candidate(2, 600, error=float("nan"))], LIMITS)
    assert decision.champion == 2
    assert "there has to be one; calibration error nan is above" in decision.reasons[2]
    assert decide(None, [candidate(1, 500), candidate(2, 600, error=0.2)], LIMITS).champion == 1
    with pytest.raises(ValueError, match="neither"):
        decide(None, [], LIMITS)


def test_the_champion_stays_if_versions_cannot_be_compared() -> None:
    better = candidate(2, 900)
    decision = decide(1, [better], LIMITS)
    assert (decision.champion, decision.reasons[2]) == (
        1,
        "version 1, the champion, has no test predictions to compare with",
    )
    fewer = Candidate(2, Evidence("d" * 64, np.arange(10), np.ones(10, bool), 0.02, 5.0))
    assert decide(candidate(1, 700), [fewer], LIMITS).champion == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_gain", -0.1), ("confidence", 1.0), ("max_calibration_error", 0), ("max_latency_ms", float("nan"))],
)
def test_invalid_limits_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"promotion\.{name} = .*give"):
        PromotionConfig(**{name: value})
