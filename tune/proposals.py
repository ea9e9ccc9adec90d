"""Which point is tried next: a pure function of what is known.

Nothing is kept between two proposals but the trials themselves, so a search that goes on on another driver proposes
what it would have proposed.
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
from tune.space import Sample, Space
from tune.trials import OBJECTIVE, Trial, score

# Points that TPE proposes and the space does not allow, before one is drawn at random instead.
MOST_REFUSED = 200


def propose(
    space: Space, settings: SearchConfig, number: int, trials: Sequence[Trial], wanted: Mapping[str, Any] | None = None
) -> Sample | None:
    """The point of trial `number`, from 0; None if a grid has no more.

    Args:
        trials: all that are known, running ones and those of earlier searches too.
        wanted: known good values; the allowed point nearest to them is the first trial.
    """
    if settings.algorithm == "grid":
        points = list(space.grid(settings.grid_points))
        _random(settings.seed, "grid").shuffle(points)
        return points[number] if number < len(points) else None
    if number == 0 and wanted is not None and space.allows(nearest := space.nearest(wanted)):
        return nearest
    rng = _random(settings.seed, str(number))
    told = sum(trial.best_value is not None for trial in trials)
    if settings.algorithm == "random" or told < settings.num_startup_trials:
        return space.draw(rng)
    return _tpe(space, settings, trials, rng)


def _tpe(space: Space, settings: SearchConfig, trials: Sequence[Trial], rng: random.Random) -> Sample:
    """Optuna's TPE over all dimensions together (Bergstra et al., 2011; Falkner et al., 2018)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=0,
            multivariate=True,
            # Running trials count as bad ones, so that two at once are not the same.
            constant_liar=True,
            seed=rng.getrandbits(31),
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {d.name: _distribution(d.scale, space.values[d.name]) for d in space.open}
    study.add_trials([_as_told(trial, space, settings, distributions) for trial in trials])
    for _ in range(MOST_REFUSED):
        asked = study.ask(distributions)
        sample = space.ordered(space.fixed | _from_optuna(asked.params, space))
        if space.allows(sample):
            return sample
        study.tell(asked, state=TrialState.FAIL)  # which TPE does not look at
    return space.draw(rng)


def _as_told(
    trial: Trial, space: Space, settings: SearchConfig, distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    """A trial as Optuna shall see it.

    One that ASHA has stopped is told as pruned, with its values by epoch: TPE ranks it after all that ran to the end,
    and among its like by the epoch that it reached. Told as complete, it would count with the value of an early epoch.
    One that failed is pruned without values, and ranks last: TPE shall stay away from where the loss becomes NaN.
    """
    params = {d.name: _to_optuna(trial.values[d.name], d.scale, space.values[d.name]) for d in space.open}
    told: dict[str, Any] = {"params": params, "distributions": distributions}
    if trial.status == "running":
        return create_trial(state=TrialState.RUNNING, **told)
    if trial.status == "failed" or trial.best_value is None:
        return create_trial(state=TrialState.PRUNED, **told)
    told["intermediate_values"] = {
        int(row["epoch"]): score(row[OBJECTIVE], trial.gflops, settings) for row in trial.history
    }
    if trial.status == "stopped early":
        return create_trial(state=TrialState.PRUNED, **told)
    return create_trial(value=score(trial.best_value, trial.gflops, settings), **told)


def _distribution(scale: str, values: tuple[Any, ...]) -> BaseDistribution:
    """Choices are sizes in ascending order: TPE is given their places in it, so that it knows which are neighbours."""
    return FloatDistribution(values[0], values[-1], log=True) if scale == "log" else IntDistribution(0, len(values) - 1)


def _to_optuna(value: Any, scale: str, values: tuple[Any, ...]) -> Any:
    return value if scale == "log" else values.index(value)


def _from_optuna(params: Mapping[str, Any], space: Space) -> Sample:
    return {d.name: params[d.name] if d.scale == "log" else space.values[d.name][params[d.name]] for d in space.open}


def _random(seed: int, purpose: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{seed}/{purpose}".encode()).digest())
