"""The next point to try, as a pure function of the seed, the trial's number and the known trials.

A sampler keeps no state between two proposals, so that a search that was cut off continues with the same proposals.
Ray Tune's `OptunaSearch` is not used: its study lives in memory and in Tune's snapshots, and it cannot reject a point.
"""

import hashlib
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune.config import SearchConfig
from tune.journal import OBJECTIVE, Trial, score
from tune.space import Sample, Space

# After this many proposals of TPE outside the space or already tried, a point is sampled at random instead; and after
# this many random ones that were tried already, one of them is tried again.
MAX_REJECTED = 200
Key = tuple[tuple[str, str], ...]


def propose(
    space: Space,
    settings: SearchConfig,
    number: int,
    trials: Sequence[Trial],
    preset: Mapping[str, Any] | None = None,
    earlier: Sequence[Trial] = (),
) -> Sample | None:
    """The point of trial `number` (from 0), which has not been tried yet; None if the grid has no more points.

    Args:
        trials: trials of this search, including running ones.
        preset: known good values; the point of the space nearest to them is the first trial, if it is allowed.
        earlier: trials of earlier searches. A point at which one of them failed may be tried again, since it may have
            failed of something that is not part of a point, such as the memory limit.
    """
    tried = {_key(trial.values) for trial in trials}
    tried |= {_key(trial.values) for trial in earlier if trial.status != "failed"}
    if settings.algorithm == "grid":
        points = list(space.grid(settings.grid_points))
        _random(settings.seed, "grid").shuffle(points)
        return next((point for point in points[number:] if _key(point) not in tried), None)
    if _has_no_other(space, tried):
        tried.clear()
    if number == 0 and preset is not None:
        nearest = space.nearest(preset)
        if space.allows(nearest) and _key(nearest) not in tried:
            return nearest
    rng, known = _random(settings.seed, str(number)), [*earlier, *trials]
    with_value = {_key(trial.values) for trial in known if trial.best_value is not None}
    if settings.algorithm == "random" or len(with_value) < settings.num_startup_trials:
        return _draw(space, rng, tried)
    return _tpe(space, settings, known, tried, rng)


def _key(values: Mapping[str, Any]) -> Key:
    """Tells a point from all others. Two points are the same if they differ by rounding alone."""
    return tuple(sorted((name, f"{value:.12g}") for name, value in values.items()))


def _has_no_other(space: Space, tried: set[Key]) -> bool:
    """Whether all points have been tried. A space with an open range always has others."""
    return all(d.scale == "choice" for d in space.open) and all(_key(point) in tried for point in space.grid(1))


def _draw(space: Space, rng: random.Random, tried: set[Key]) -> Sample:
    """A random point that has not been tried, unless so few are left that none of `MAX_REJECTED` draws finds one."""
    for _ in range(MAX_REJECTED):
        if _key(point := space.draw(rng)) not in tried:
            break
    return point


def _tpe(space: Space, settings: SearchConfig, trials: Sequence[Trial], tried: set[Key], rng: random.Random) -> Sample:
    """A sample of Optuna's multivariate TPE (Bergstra et al., 2011; Falkner et al., 2018)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=0,
            multivariate=True,
            # Counts running trials as bad ones, so that concurrent trials differ.
            constant_liar=True,
            seed=rng.getrandbits(31),
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {d.name: _distribution(d.scale, space.values[d.name]) for d in space.open}
    study.add_trials([_to_optuna_trial(trial, space, settings, distributions) for trial in trials])
    for _ in range(MAX_REJECTED):
        asked = study.ask(distributions)
        sample = space.ordered(space.fixed | _from_optuna(asked.params, space))
        if space.allows(sample) and _key(sample) not in tried:
            return sample
        study.tell(asked, state=TrialState.FAIL)  # TPE ignores failed trials
    return _draw(space, rng, tried)


def _to_optuna_trial(
    trial: Trial, space: Space, settings: SearchConfig, distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    """The trial as Optuna sees it.

    A trial that ASHA stopped becomes a pruned one with its values by epoch. TPE ranks pruned trials after all completed
    ones, and among each other by the epoch that they reached; as a completed trial it would count with the value of an
    early epoch. A failed trial becomes a pruned one without values, which ranks last, so that TPE avoids the region in
    which the loss becomes NaN.
    """
    values = space.within(trial.values)  # Optuna refuses one just outside its range
    params = {d.name: _to_optuna(values[d.name], d.scale, space.values[d.name]) for d in space.open}
    fields: dict[str, Any] = {"params": params, "distributions": distributions}
    if trial.status == "running":
        return create_trial(state=TrialState.RUNNING, **fields)
    if trial.status == "failed" or trial.best_value is None:
        return create_trial(state=TrialState.PRUNED, **fields)
    fields["intermediate_values"] = {
        int(row["epoch"]): score(row[OBJECTIVE], trial.gflops, settings) for row in trial.history
    }
    if trial.status == "stopped early":
        return create_trial(state=TrialState.PRUNED, **fields)
    return create_trial(value=score(trial.best_value, trial.gflops, settings), **fields)


def _distribution(scale: str, values: tuple[Any, ...]) -> BaseDistribution:
    """Choices are sampled by their position in the ascending list, so that TPE knows which ones are neighbours."""
    return FloatDistribution(values[0], values[-1], log=True) if scale == "log" else IntDistribution(0, len(values) - 1)


def _to_optuna(value: Any, scale: str, values: tuple[Any, ...]) -> Any:
    return value if scale == "log" else values.index(value)


def _from_optuna(params: Mapping[str, Any], space: Space) -> Sample:
    return {d.name: params[d.name] if d.scale == "log" else space.values[d.name][params[d.name]] for d in space.open}


def _random(seed: int, purpose: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{seed}/{purpose}".encode()).digest())
