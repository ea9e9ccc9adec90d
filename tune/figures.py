"""Figures of a search, drawn by `optuna.visualization` into one interactive HTML page that works offline."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import plotly.exceptions
import plotly.graph_objects as go
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from tune.config import SearchConfig
from tune.journal import OBJECTIVE, Trial
from tune.space import Space

PAGE_FILE = "search.html"
MIN_TRIALS_FOR_IMPORTANCE = 4
# What Optuna and plotly raise for trials that they cannot draw: a value outside of its distribution or of a property's
# range is a ValueError; fANOVA raises a RuntimeError if its trees find no variance, e.g. among trials of one point.
NOT_DRAWN = (ValueError, RuntimeError, optuna.exceptions.OptunaError, plotly.exceptions.PlotlyError)
Warn = Callable[[str], None]


def draw(
    trials: Sequence[Trial], space: Space, settings: SearchConfig, folder: Path, warn: Warn = warnings.warn
) -> list[Path]:
    """Draws the figures of a search into `folder`.

    Returns:
        The file `search.html`; nothing if no trial has completed an epoch, or no figure can be drawn.
    """
    found = figures(trials, space, settings, warn)
    if not found:
        return []
    # plotly.js is part of the first figure, so that the page needs no network.
    parts = [figure.to_html(full_html=False, include_plotlyjs=index == 0) for index, figure in enumerate(found)]
    page = folder / PAGE_FILE
    page.write_text(
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>Search, {len(trials)} trials</title></head>"
        f"<body style='max-width:1100px;margin:auto'>{''.join(parts)}</body></html>\n"
    )
    return [page]


def figures(
    trials: Sequence[Trial], space: Space, settings: SearchConfig, warn: Warn = warnings.warn
) -> list[go.Figure]:
    """Parallel coordinates, best value so far, value by hyperparameter, value against cost, and importances.

    A trial that was stopped early counts with its best value. Importances need at least four trials, not all of
    the same value. A figure that cannot be drawn is left out, and `warn` told why: the trials have been trained.
    """
    valued = [trial for trial in trials if trial.best_value is not None]
    if not valued:
        return []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = functools.cache(lambda: _study(trials, space, settings))
    plots: dict[str, Callable[[], go.Figure]] = {
        "parallel coordinates": lambda: visualization.plot_parallel_coordinate(study(), target_name=OBJECTIVE),
        "the best value so far": lambda: visualization.plot_optimization_history(study(), target_name=OBJECTIVE),
        "the value by hyperparameter": lambda: visualization.plot_slice(study(), target_name=OBJECTIVE),
        "the value against the cost": lambda: _value_against_cost(valued, space, settings),
    }
    if len(valued) >= MIN_TRIALS_FOR_IMPORTANCE and len({trial.best_value for trial in valued}) > 1:
        plots["the importances"] = lambda: _importances(study())
    drawn = []
    for name, plot in plots.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                drawn.append(plot())
        except NOT_DRAWN as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            warn(f"the figure of {name} cannot be drawn and is left out: {reason}")
    return drawn


def _importances(study: optuna.Study) -> go.Figure:
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    figure = visualization.plot_param_importances(study, evaluator, target_name=OBJECTIVE)
    return figure.update_layout(title="Hyperparameter importances: shares of the variance (fANOVA)")


def _study(trials: Sequence[Trial], space: Space, settings: SearchConfig) -> optuna.Study:
    """The search as an Optuna study.

    What is not the best trial whatever its value is infeasible, and Optuna draws it in grey: a model beyond the cost
    limit, and a failed trial, unless all have failed.
    """
    study = optuna.create_study(direction="maximize")
    all_failed = all(trial.status == "failed" for trial in trials if trial.best_value is not None)
    limit = settings.cost_limit_gflops
    for trial in trials:
        if trial.best_value is None:  # keeps its place, so that the other trials keep their numbers
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
            continue
        constraints = {"failed": float(trial.status == "failed" and not all_failed)}
        if limit is not None:
            constraints["cost_limit_gflops"] = trial.gflops - limit
        study.add_trial(_completed(trial, space, [trial.best_value], constraints))
    return study


def _value_against_cost(trials: Sequence[Trial], space: Space, settings: SearchConfig) -> go.Figure:
    """Value against GFLOPs with the Pareto front.

    A trial that was stopped early is not on the front, since the value that it would have reached is unknown; unless
    none was trained to the end. A failed one is on it only if all have failed.
    """
    study = optuna.create_study(directions=["minimize", "maximize"])
    best_status = min((trial.status for trial in trials), key=("finished", "stopped early", "running", "failed").index)
    for trial in trials:
        assert trial.best_value is not None
        constraints = {"status": float(trial.status != best_status)}
        study.add_trial(_completed(trial, space, [trial.gflops, trial.best_value], constraints))
    figure = visualization.plot_pareto_front(study, target_names=["GFLOPs per image, forward pass", OBJECTIVE])
    figure.update_layout(title="Accuracy against cost (red: Pareto front, grey: not trained to the end)")
    figure.update_traces(marker_showscale=False)
    figure.update_xaxes(type="log", minorloglabels="complete")
    if settings.cost_limit_gflops is not None:
        figure.add_vline(settings.cost_limit_gflops, line_dash="dash", annotation_text="limit")
    return figure


def _completed(
    trial: Trial, space: Space, values: list[float], constraints: dict[str, float] | None
) -> optuna.trial.FrozenTrial:
    """A completed Optuna trial with the open dimensions of `trial` as parameters.

    An earlier version of this project stored grid points above the highest value, by rounding, which Optuna refuses.
    """
    distributions: dict[str, BaseDistribution] = {}
    for dimension in space.open:
        listed = space.values[dimension.name]
        distributions[dimension.name] = (
            FloatDistribution(listed[0], listed[-1], log=True)
            if dimension.scale == "log"
            else CategoricalDistribution(listed)
        )
    return optuna.trial.create_trial(
        values=values,
        params={name: value for name, value in space.within(trial.values).items() if name in distributions},
        distributions=distributions,
        user_attrs={"trial": trial.name, "status": trial.status, "epochs": trial.epochs},
        constraints=constraints,
    )
