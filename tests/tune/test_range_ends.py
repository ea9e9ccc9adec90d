"""Rounding puts no value outside its range, and a figure that cannot be drawn does not end a search."""

import math
import random
from typing import Any

import pytest
from optuna import visualization

from perceiver.config import PerceiverConfig
from tune.config import SearchConfig
from tune.figures import figures
from tune.journal import Journal, Trial
from tune.proposals import propose
from tune.space import DIMENSIONS, Space

CLOSED: dict[str, Any] = {d.name: () for d in DIMENSIONS}
NUMBERS = sorted(float(f"{digit}e-{power}") for digit in range(1, 10) for power in range(1, 5))
RANGES = [(low, high) for low in NUMBERS for high in NUMBERS if low < high]


def space_of(low: float, high: float) -> Space:
    return Space.of(SearchConfig(**CLOSED | {"learning_rate": (low, high)}), PerceiverConfig())


class Extreme(random.Random):
    """Draws an end of the interval."""

    def __init__(self, end: int) -> None:
        super().__init__(0)
        self._end = end

    def uniform(self, a: float, b: float) -> float:
        return (a, b)[self._end]


def test_points_of_a_grid_and_drawn_ones_are_within_the_range() -> None:
    assert any(low * (high / low) > high for low, high in RANGES)
    assert any(math.exp(math.log(high)) > high for _, high in RANGES)
    for low, high in RANGES:
        space = space_of(low, high)
        points = [*space.grid(3), *(space.draw(Extreme(end)) for end in (0, 1))]
        assert all(space.contains(point) for point in points), (low, high)


def trials_at(rates: list[float]) -> list[Trial]:
    trials = [Trial(f"trial-{n:04d}", {"learning_rate": rate}, 0.1, 10) for n, rate in enumerate(rates, 1)]
    for number, trial in enumerate(trials):
        trial.add_epoch({"epoch": 1, "val_accuracy": 0.5 + 0.01 * number})
        trial.end("finished")
    return trials


def drawn(rates: list[float]) -> tuple[int, list[str]]:
    """The number of figures, and the warnings."""
    said: list[str] = []
    settings = SearchConfig(**CLOSED | {"learning_rate": (1e-3, 9e-3)})
    space = Space.of(settings, PerceiverConfig())
    return len(figures(trials_at(rates), space, settings, said.append)), said


def test_a_stored_trial_just_above_the_range_is_drawn() -> None:
    assert drawn([1e-3, 3e-3, 0.009000000000000001, 5e-3]) == (5, [])


def test_a_figure_that_cannot_be_drawn_is_a_warning() -> None:
    """The trees of fANOVA find no variance among trials of one point, whatever their values."""
    count, said = drawn([3e-3] * 4)
    assert count == 4
    assert said == [
        "the figure of the importances cannot be drawn and is left out: RuntimeError: Encountered zero total variance "
        "in all trees."
    ]


def test_a_mistake_of_the_code_that_draws_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualization, "plot_slice", None)
    with pytest.raises(TypeError):
        drawn([3e-3, 5e-3])


class Memory:
    """A store whose files are in memory."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def write_json(self, path: str, value: Any) -> None:
        self.files[path] = value

    def read_json(self, path: str) -> Any:
        return self.files[path]

    def exists(self, path: str) -> bool:
        return path in self.files

    def list(self, path: str) -> list[str]:
        return [name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")]

    def delete(self, path: str) -> None:
        del self.files[path]


def test_an_earlier_trial_just_outside_the_range_is_not_lost() -> None:
    store, space = Memory(), space_of(1e-3, 9e-3)
    before = Journal(store, "before")
    for trial in trials_at([0.0009999999999999998, 3e-3, 0.009000000000000001, 0.00901]):
        before.write(trial)
    taken = Journal(store, "now", ["before"]).earlier(space)
    assert [trial.values["learning_rate"] for trial in taken] == [0.0009999999999999998, 3e-3, 0.009000000000000001]
    settings = SearchConfig(**CLOSED | {"learning_rate": (1e-3, 9e-3), "num_startup_trials": 1})
    proposed = propose(space, settings, 1, taken, earlier=taken)
    assert proposed is not None
    assert 1e-3 <= proposed["learning_rate"] <= 9e-3


def test_the_value_of_a_fixed_dimension_is_its_own() -> None:
    space = Space({"learning_rate": (1e-3,)}, PerceiverConfig())
    assert space.contains({"learning_rate": 1e-3})
    assert not space.contains({"learning_rate": 1.0001e-3})
