"""Figures of a search: one page to look into with a mouse, and a PNG of each for everywhere else."""

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from tune.config import SearchConfig
from tune.space import Space
from tune.trials import Trial

PAGE_FILE = "search.html"
COLOURS = {"finished": "#1f77b4", "stopped early": "#aaaaaa", "failed": "#d62728", "running": "#2ca02c"}
SIZE = (9, 5)  # inches
IMPORTANCE_TITLE = "Importance of each hyperparameter (fANOVA; stopped trials with the value that they had come to)"


def draw(trials: Sequence[Trial], space: Space, settings: SearchConfig, folder: Path) -> list[Path]:
    """Draws what the trials with an epoch say into `folder`.

    Returns:
        `search.html`, with all figures, then `parallel_coordinates.png`, `best_value.png`, `importance.png` (where two
        trials differ) and `accuracy_against_gflops.png`; nothing if no trial has come as far as one epoch.
    """
    shown = [trial for trial in trials if trial.best_value is not None]
    if not shown:
        return []
    importance = importances(shown, space)
    pictures = {
        "parallel_coordinates": (_coordinates_page(shown, space), _coordinates_picture(shown, space)),
        "best_value": (_best_page(shown), _best_picture(shown)),
        "accuracy_against_gflops": (_front_page(shown, settings), _front_picture(shown, settings)),
    }
    if importance:
        pictures["importance"] = (_importance_page(importance), _importance_picture(importance))
    page = folder / PAGE_FILE
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0)
        for number, (figure, _) in enumerate(pictures.values())
    ]
    page.write_text(
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>Search, {len(shown)} trials</title></head>"
        f"<body style='max-width:1100px;margin:auto'>{''.join(parts)}</body></html>\n"
    )
    files = [page]
    for name, (_, picture) in pictures.items():
        files.append(folder / f"{name}.png")
        picture.savefig(files[-1], dpi=120)
    return files


def importances(trials: Sequence[Trial], space: Space) -> dict[str, float]:
    """Share of the variance of the trials' best values that each open dimension explains (fANOVA, Hutter et al., 2014).

    A trial that was stopped early counts with the value that it had come to. Empty where there is nothing to explain.
    """
    if len({trial.best_value for trial in trials}) < 2 or len(trials) < 4:
        return {}
    study = optuna.create_study(direction="maximize")
    distributions: dict[str, BaseDistribution] = {}
    for d in space.open:
        listed = space.values[d.name]
        is_range = d.scale == "log"
        distributions[d.name] = (
            FloatDistribution(listed[0], listed[-1], log=True) if is_range else CategoricalDistribution(listed)
        )
    for trial in trials:
        params = {name: trial.values[name] for name in distributions}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.best_value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in accuracy at the same cost or less, by ascending GFLOPs.

    Only of those that came to their end, if any did: what a stopped one would have reached is not known.
    """
    front: list[Trial] = []
    comparable = [trial for trial in trials if trial.status == "finished"] or trials
    for trial in sorted(comparable, key=lambda trial: (trial.gflops, -_value(trial))):
        if not front or _value(trial) > _value(front[-1]):
            front.append(trial)
    return front


def _value(trial: Trial) -> float:
    assert trial.best_value is not None
    return trial.best_value


def _text(trial: Trial) -> str:
    values = "<br>".join(f"{name} = {value:.4g}" for name, value in trial.values.items())
    return f"{trial.name}, {trial.status}, {trial.epochs} epochs<br>{values}"


def _coordinates_page(trials: Sequence[Trial], space: Space) -> go.Figure:
    dimensions: list[dict[str, Any]] = []
    for d in space.open:
        listed = space.values[d.name]
        if d.scale == "log":
            marks = [listed[0], math.sqrt(listed[0] * listed[-1]), listed[-1]]
            ticks = {"tickvals": [math.log10(mark) for mark in marks], "ticktext": [f"{mark:.2g}" for mark in marks]}
            places = [math.log10(trial.values[d.name]) for trial in trials]
            dimensions.append({"label": d.name, "values": places, **ticks})
        else:  # sizes side by side, whatever they are
            ticks = {"tickvals": list(range(len(listed))), "ticktext": [str(value) for value in listed]}
            places = [listed.index(trial.values[d.name]) for trial in trials]
            dimensions.append({"label": d.name, "values": places, **ticks})
    values = [_value(trial) for trial in trials]
    dimensions.append({"label": "best val_accuracy", "values": values})
    line = {"color": values, "colorscale": "Viridis", "showscale": True}
    return go.Figure(go.Parcoords(line=line, dimensions=dimensions), {"title": "Trials in parallel coordinates"})


def _coordinates_picture(trials: Sequence[Trial], space: Space) -> matplotlib.figure.Figure:
    picture = matplotlib.figure.Figure(figsize=SIZE, layout="constrained")
    axes, names = picture.subplots(), [d.name for d in space.open]
    values = [_value(trial) for trial in trials]
    low, span = min(values), (max(values) - min(values)) or 1.0
    colours = matplotlib.colormaps["viridis"]
    for number, trial in enumerate(sorted(trials, key=_value)):
        apart = 0.04 * (number / len(trials) - 0.5)  # lines through the same choice
        places = [
            _place(trial.values[d.name], space.values[d.name], d.scale) + apart * (d.scale != "log") for d in space.open
        ]
        share = (_value(trial) - low) / span
        axes.plot(range(len(names) + 1), [*places, share], color=colours(share), alpha=0.7)
    for x, d in enumerate(space.open):
        listed = space.values[d.name]
        for value in listed:
            axes.annotate(
                f"{value:g}", (x, _place(value, listed, d.scale)), (4, 0), textcoords="offset points", fontsize=7
            )
        axes.axvline(x, color="black", linewidth=0.5)
    for value in (low, low + span):
        axes.annotate(
            f"{value:.3f}", (len(names), (value - low) / span), (4, 0), textcoords="offset points", fontsize=7
        )
    axes.axvline(len(names), color="black", linewidth=0.5)
    labels = [name.replace("num_self_attention_", "").replace("num_", "") for name in names]
    axes.set_xticks(range(len(names) + 1), [*labels, "val_accuracy"], rotation=15)
    axes.set_yticks([])
    axes.set_title("Trials in parallel coordinates")
    return picture


def _place(value: float, listed: Sequence[float], scale: str) -> float:
    """Height of a value on its axis, from 0 to 1."""
    if scale != "log":
        return listed.index(value) / (len(listed) - 1)
    return math.log(value / listed[0]) / math.log(listed[-1] / listed[0])


def _over_time(trials: Sequence[Trial]) -> tuple[list[float], list[float], list[float], list[Trial]]:
    """Minutes since the first trial began at which each ended, its value, and the best so far."""
    ended = sorted(trials, key=lambda trial: trial.ended or time.time())
    begin = min(trial.started for trial in trials)
    minutes = [((trial.ended or time.time()) - begin) / 60 for trial in ended]
    values = [_value(trial) for trial in ended]
    return minutes, values, [max(values[: i + 1]) for i in range(len(values))], ended


def _best_page(trials: Sequence[Trial]) -> go.Figure:
    minutes, values, best, ended = _over_time(trials)
    line = go.Scatter(x=minutes, y=best, mode="lines", line={"shape": "hv"}, name="best so far")
    titles = {"xaxis_title": "minutes", "yaxis_title": "val_accuracy"}
    return go.Figure([line, *_dots(minutes, values, ended)], {"title": "Best value over time", **titles})


def _best_picture(trials: Sequence[Trial]) -> matplotlib.figure.Figure:
    minutes, values, best, ended = _over_time(trials)
    picture = matplotlib.figure.Figure(figsize=SIZE, layout="constrained")
    axes = picture.subplots()
    axes.step(minutes, best, where="post", color="black", label="best so far")
    _marks(axes, minutes, values, ended)
    axes.set(title="Best value over time", xlabel="minutes", ylabel="val_accuracy")
    axes.legend()
    return picture


def _front_page(trials: Sequence[Trial], settings: SearchConfig) -> go.Figure:
    front = pareto_front(trials)
    dots = _dots([trial.gflops for trial in trials], [_value(trial) for trial in trials], trials)
    x, y = [trial.gflops for trial in front], [_value(trial) for trial in front]
    line = go.Scatter(x=x, y=y, mode="lines+markers", line={"shape": "hv"}, name="Pareto front")
    figure = go.Figure([*dots, line], {"title": "Accuracy against cost"})
    figure.update_xaxes(type="log", title="GFLOPs an image, forward", minorloglabels="complete")
    figure.update_yaxes(title="val_accuracy")
    if settings.cost_limit_gflops is not None:
        figure.add_vline(settings.cost_limit_gflops, line_dash="dash", annotation_text="limit")
    return figure


def _front_picture(trials: Sequence[Trial], settings: SearchConfig) -> matplotlib.figure.Figure:
    picture = matplotlib.figure.Figure(figsize=SIZE, layout="constrained")
    axes, front = picture.subplots(), pareto_front(trials)
    _marks(axes, [trial.gflops for trial in trials], [_value(trial) for trial in trials], trials)
    x, y = [trial.gflops for trial in front], [_value(trial) for trial in front]
    axes.step(x, y, where="post", color="black", marker="o", markersize=3, label="Pareto front")
    if settings.cost_limit_gflops is not None:
        axes.axvline(settings.cost_limit_gflops, linestyle="--", color="grey", label="limit")
    axes.set(title="Accuracy against cost", xlabel="GFLOPs an image, forward", ylabel="val_accuracy", xscale="log")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks("{x:.3g}")
    axes.legend()
    return picture


def _importance_page(importance: dict[str, float]) -> go.Figure:
    names = list(reversed(importance))
    bars = go.Bar(x=[importance[name] for name in names], y=names, orientation="h")
    return go.Figure(bars, {"title": IMPORTANCE_TITLE, "xaxis_title": "share of variance"})


def _importance_picture(importance: dict[str, float]) -> matplotlib.figure.Figure:
    picture = matplotlib.figure.Figure(figsize=SIZE, layout="constrained")
    axes, names = picture.subplots(), list(reversed(importance))
    axes.barh(names, [importance[name] for name in names])
    axes.set(title=IMPORTANCE_TITLE, xlabel="share of variance")
    return picture


def _dots(x: Sequence[float], y: Sequence[float], trials: Sequence[Trial]) -> list[go.Scatter]:
    """As `_marks`, for a page."""
    dots = []
    for status, colour in COLOURS.items():
        chosen = [i for i, trial in enumerate(trials) if trial.status == status]
        texts = [_text(trials[i]) for i in chosen]
        places = {"x": [x[i] for i in chosen], "y": [y[i] for i in chosen]}
        if chosen:
            dots.append(go.Scatter(**places, mode="markers", name=status, text=texts, marker={"color": colour}))
    return dots


def _marks(axes: matplotlib.axes.Axes, x: Sequence[float], y: Sequence[float], trials: Sequence[Trial]) -> None:
    """A dot a trial, coloured by how it ended."""
    for status, colour in COLOURS.items():
        chosen = [i for i, trial in enumerate(trials) if trial.status == status]
        if chosen:
            axes.scatter([x[i] for i in chosen], [y[i] for i in chosen], color=colour, s=18, label=status, zorder=3)
