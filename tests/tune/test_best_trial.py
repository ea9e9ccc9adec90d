"""Which trial of a search is the best, and what is said where there is none."""

from dataclasses import replace
from typing import Any

import pytest

from perceiver.config import PerceiverConfig
from pipeline.settings.presets import quickstart
from tune.config import SearchConfig
from tune.figures import figures
from tune.journal import Trial, best_of, no_best, score
from tune.space import DIMENSIONS, Space, gflops_per_image, to_model

BASE = PerceiverConfig(num_latents=16, latent_dim=64, num_self_attention_heads=4)
LATENTS: dict[str, Any] = dict.fromkeys([d.name for d in DIMENSIONS], ()) | {"num_latents": (8, 16)}


def trial(name: str, *accuracies: float, status: Any = "finished", gflops: float = 0.1) -> Trial:
    history = [{"epoch": float(i), "val_accuracy": value} for i, value in enumerate(accuracies, 1)]
    return Trial(name, {"num_latents": 8}, gflops, 1000, status=status, history=history)


def test_the_best_within_a_cost_limit() -> None:
    trials = [
        trial("cheap", 0.3),
        trial("right", 0.5, 0.4, gflops=0.2),
        trial("dear", 0.9, gflops=0.3),
        trial("nothing", status="failed"),
    ]
    assert best_of(trials, SearchConfig()) is trials[2]
    settings = SearchConfig(objective="accuracy_at_cost", cost_limit_gflops=0.2)
    assert best_of(trials, settings) is trials[1]
    scores = [score(0.5, gflops, settings) for gflops in (0.1, 0.2, 0.3, 0.4)]
    assert scores == [0.5, 0.5, pytest.approx(-0.5), pytest.approx(-1.0)]
    assert best_of([trials[3]], settings) is None
    with pytest.raises(ValueError, match="accuracy_at_cost needs the limit"):
        SearchConfig(objective="accuracy_at_cost")


def test_a_search_without_a_best_trial_says_why() -> None:
    settings = SearchConfig(objective="accuracy_at_cost", cost_limit_gflops=0.2)
    dear, failed = trial("dear", 0.9, gflops=0.3), trial("nothing", status="failed")
    failed.error = "OSError: gone"
    assert no_best([dear], settings) == (
        "no trial is within search.cost_limit_gflops = 0.2, and the cheapest of the 1 has 0.3: raise the limit, search "
        "smaller models, or give more trials"
    )
    within = "no trial within search.cost_limit_gflops = 0.2 came as far as one epoch; the first one: OSError: gone"
    assert no_best([dear, failed], settings) == within
    assert no_best([failed], SearchConfig()) == "no trial came as far as one epoch; the first one: OSError: gone"


def test_a_cost_limit_below_all_models_is_an_error_before_the_search() -> None:
    cheapest = gflops_per_image(to_model({"num_latents": 8}, BASE))

    def of_limit(limit: float) -> SearchConfig:
        return SearchConfig(**LATENTS, objective="accuracy_at_cost", cost_limit_gflops=limit)

    Space.of(of_limit(cheapest), BASE)
    message = r"search\.cost_limit_gflops = 1e-06 is less than the {} of the cheapest .* raise it, or search smaller"
    with pytest.raises(ValueError, match=message.format(f"{cheapest:g}")):
        Space.of(of_limit(1e-6), BASE)
    with pytest.raises(ValueError, match=message.format(r"[\d.]+")):
        replace(quickstart(), search=of_limit(1e-6)).search_space()


def test_a_failed_trial_is_the_best_only_if_all_have_failed() -> None:
    """A trial that diverges is often the one that was ahead before."""
    settings = SearchConfig(**LATENTS)
    space = Space.of(settings, BASE)
    diverged = trial("diverged", 0.7, 0.82, status="failed")
    trials = [diverged, trial("stopped", 0.5, status="stopped early"), trial("whole", 0.5, 0.6)]
    assert [best_of(trials[:count], settings) for count in (1, 2, 3)] == trials
    best, infeasible = figures(trials, space, settings)[1].data[1:]
    assert list(best.y)[1:] == [0.5, 0.6], "nor is it the best in the figure"
    assert list(infeasible.y) == [0.82]
    assert list(figures([diverged], space, settings)[1].data[1].y) == [0.82]
