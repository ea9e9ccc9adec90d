"""No point is proposed that has been tried, and a search that was cut off goes on with the same proposals."""

from dataclasses import replace
from typing import Any

import pytest

from perceiver.config import PerceiverConfig
from tune.config import SearchConfig
from tune.journal import Trial
from tune.proposals import propose
from tune.space import DIMENSIONS, Space

BASE = PerceiverConfig(num_latents=16, latent_dim=64, num_self_attention_heads=4)
CLOSED: dict[str, Any] = {d.name: () for d in DIMENSIONS}
OPEN = SearchConfig(
    **CLOSED | {"num_latents": (8, 16), "learning_rate": (1e-3, 9e-3)}, num_startup_trials=4, grid_points=5
)
CHOICES = SearchConfig(**CLOSED | {"num_latents": (8, 16, 32), "num_iterations": (1, 2)}, num_startup_trials=2)
PRESET = {"num_latents": 16, "num_iterations": 1, "learning_rate": 2e-3}


def run(
    settings: SearchConfig, earlier: list[Trial] | None = None, begun: list[Trial] | None = None, status: Any = None
) -> list[Trial]:
    """The trials of a search, one after the other, which goes on from those in `begun`."""
    space, earlier, trials = Space.of(settings, BASE), earlier or [], list(begun or ())
    for number in range(len(trials), settings.num_trials):
        values = propose(space, settings, number, trials, PRESET, earlier)
        if values is None:
            break
        trial = Trial.of(f"trial-{number + 1:04d}", values, space)
        if status != "failed":
            trial.add_epoch({"epoch": 1, "val_accuracy": 0.5 + 0.01 * (number * 7 % 5)})
        trial.end(status or "finished")
        trials.append(trial)
    return trials


def points(trials: list[Trial]) -> set[tuple[Any, ...]]:
    return {tuple(trial.values.values()) for trial in trials}


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
@pytest.mark.parametrize("settings", [OPEN, CHOICES])
def test_a_larger_search_tries_none_of_the_points_that_it_takes_over(algorithm: Any, settings: SearchConfig) -> None:
    first = run(replace(settings, algorithm=algorithm, num_trials=3))
    second = run(replace(settings, algorithm=algorithm, num_trials=6), first)
    assert len(second) == (3 if (algorithm, settings) == ("grid", CHOICES) else 6)
    new = second[:3]  # of the six points of `CHOICES`, three are left
    assert len(points(first)) == len(points(new)) == 3
    assert not points(first) & points(new)


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_a_search_that_was_cut_off_proposes_the_same_points(algorithm: Any) -> None:
    settings = replace(OPEN, algorithm=algorithm, num_trials=6)
    earlier = run(replace(settings, num_trials=3))
    whole = run(settings, earlier)
    for cut in range(6):
        assert [t.values for t in run(settings, earlier, whole[:cut])] == [t.values for t in whole]
    assert len(points(whole)) == 6


def test_the_start_up_counts_points_and_not_trials() -> None:
    """Four trials of one point tell TPE no more than one does."""
    (trial,) = run(replace(OPEN, num_trials=1))
    settings, space = replace(OPEN, num_trials=8), Space.of(OPEN, BASE)
    drawn = propose(space, replace(settings, algorithm="random"), 4, [trial] * 4)
    assert propose(space, settings, 4, [trial] * 4) == drawn
    assert propose(space, settings, 4, run(replace(OPEN, num_trials=4))) != drawn, "TPE has four points"


@pytest.mark.parametrize("algorithm", ["random", "grid"])
def test_a_point_at_which_an_earlier_trial_failed_may_be_tried_again(algorithm: Any) -> None:
    settings = replace(OPEN, algorithm=algorithm, num_trials=4)
    failed = run(settings, status="failed")
    assert len(points(failed)) == 4, "within a search, none is tried again"
    assert [t.values for t in run(settings, failed)] == [t.values for t in failed]


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_a_space_without_another_point_is_tried_again(algorithm: Any) -> None:
    settings = replace(CHOICES, algorithm=algorithm, num_trials=9)
    trials = run(settings)
    assert len(trials) == 9
    assert len(points(trials[:6])) == 6, "before that, each of the six points is tried once"


def test_a_stored_grid_point_that_differs_by_rounding_is_the_same() -> None:
    """An earlier version of this project stored 0.009000000000000001 for the end of the range."""
    settings = replace(OPEN, algorithm="grid", num_trials=10)
    trials = run(settings)
    (last,) = (t for t in trials if t.values["num_latents"] == 8 and t.values["learning_rate"] == 9e-3)
    last.values["learning_rate"] = 0.009000000000000001
    assert run(replace(settings, num_trials=11), trials) == []
