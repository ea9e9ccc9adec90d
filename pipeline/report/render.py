"""Renders the report of a run: one HTML page on how good the model is, where it errs, and what it cost.

`render` needs neither Keras nor a network. `report.html.jinja` holds the layout and the texts, `report.css` the style.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.evaluation_sections import evaluation_values
from pipeline.report.svg_charts import line_chart, number, percent, reliability_chart


@dataclass(frozen=True)
class ReportInputs:
    """What the report is made from.

    Attributes:
        title: heading of the page.
        outputs: outputs of the tasks preprocess, search, train, evaluate and register, by task name.
        seconds: wall-clock time of each task, by task name.
        settings: resolved settings, `section.field` to value.
        results: what `pipeline.evaluation.evaluate.evaluate` found.
        pictures: arrays that the evaluation stored for the report: test images and attention maps.
        parameters: number of parameters of the model.
        macs_per_image: multiply-accumulate operations of a forward pass for one image.
        workers: number of training workers.
        cpus_per_worker: CPUs of each training worker.
        gpus_per_worker: GPUs on which each training worker computed.
        run_id: id of the MLflow run, if there is one.
    """

    title: str
    outputs: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    pictures: Mapping[str, np.ndarray]
    parameters: int
    macs_per_image: int
    workers: int
    cpus_per_worker: float
    gpus_per_worker: int = 0
    run_id: str | None = None


class Figure(NamedTuple):
    """A chart with its title and caption."""

    title: str
    chart: Markup
    caption: str = ""


def render(inputs: ReportInputs) -> str:
    """The report as self-contained HTML; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template("report.html.jinja").render(
        title=inputs.title,
        results=inputs.results,
        splits=inputs.outputs["preprocess"]["splits"],
        registered=inputs.outputs.get("register"),
        best_epoch=inputs.outputs["train"]["best_epoch"],
        tiles=_tiles(inputs),
        learning_curves=_learning_curves(inputs.outputs["train"]["history"]),
        search=_search(inputs.outputs.get("search", {})),
        reliability_chart=reliability_chart,
        cost_rows=_cost_rows(inputs),
        task_rows=[[name, f"{seconds:,.1f} s"] for name, seconds in inputs.seconds.items()],
        identity_rows=_identity_rows(inputs),
        setting_rows=[[name, _readable(value)] for name, value in inputs.settings.items()],
        **evaluation_values(inputs.results, inputs.pictures),
    )


def _tiles(inputs: ReportInputs) -> dict[str, str]:
    """The most important numbers, by their description."""
    results, test = inputs.results, inputs.results["test"]
    low, high = (100 * bound for bound in _interval(test["top1"], test["num_examples"]))
    tiles = {
        f"test top-1, {low:.1f} to {high:.1f} (95%)": f"{100 * test['top1']:.1f}%",
        "test top-5": f"{100 * test['top5']:.1f}%",
        "test loss, in nats": f"{test['loss']:.3f}",
        "calibration error, after temperature scaling": f"{100 * results['calibration']['after']['ece']:.1f}%",
    }
    if robustness := results["robustness"]:
        tiles["top-1 on corrupted images, mean"] = f"{100 * robustness['mean_top1']:.1f}%"
    count = inputs.parameters
    return tiles | {
        "latency for one image, median": f"{results['speed']['batch_1_median_ms']:.1f} ms",
        "parameters": f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}",
        "GFLOPs per image": number(2 * inputs.macs_per_image / 1e9),
    }


def _learning_curves(history: Sequence[Mapping[str, Any]]) -> list[Figure]:
    def curves(y_label: str, names: Mapping[str, str], **options: Any) -> Markup:
        series = {
            title: [(epoch["epoch"], float(epoch[name])) for epoch in history if name in epoch]
            for name, title in names.items()
        }
        return line_chart(series, x_label="epoch", y_label=y_label, markers=len(history) < 12, **options)

    figures = [
        Figure(
            "Loss",
            curves("loss", {"loss": "training", "val_loss": "validation"}),
            "Training loss with augmentation, dropout and label smoothing, where they are on.",
        ),
        Figure(
            "Accuracy",
            curves("top-1", {"accuracy": "training", "val_accuracy": "validation"}, y_format=percent),
        ),
    ]
    if any("learning_rate" in epoch for epoch in history):
        figures.append(Figure("Learning rate", curves("learning rate", {"learning_rate": "learning rate"})))
    figures.append(Figure("Throughput", curves("training images/s", {"images_per_second": "images/s"})))
    return figures


def _search(search: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table of the trials; None if there was no search. `tune.figures` draws the figures of a search.

    An earlier search may have found the best trial, so that there may be one although no trial here has a value.
    """
    trials = [trial for trial in search.get("trials", ()) if trial.get("best_value") is not None]
    if search.get("best_value") is None:
        return None
    names = [name for name in trials[0]["values"] if _is_searched(name, trials)] if trials else []
    rows = [
        [
            _trial_name(trial["name"]),
            *(_readable(trial["values"][name]) for name in names),
            number(trial["gflops"]),
            len(trial["history"]),
            trial["status"],
            percent(round(trial["best_value"], 4)),
        ]
        for trial in sorted(trials, key=lambda trial: (trial["status"] == "failed", -trial["best_value"]))
    ]
    return {
        "num_trials": len(search["trials"]),
        "num_failed": len(search["trials"]) - len(trials),
        "best_trial": _best_trial(search, trials),
        "best_value": search["best_value"],
        "page": next(iter(search["figures"]), None),
        "header": ["trial", *names, "GFLOPs per image", "epochs", "status", "validation top-1"],
        "rows": rows,
    }


def _interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` rows (Wilson, 1927), which is not empty where all or none are hits."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _is_searched(name: str, trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the value `name` is a number that differs between trials."""
    values = [trial["values"].get(name) for trial in trials]
    return len(set(values)) > 1 and all(isinstance(value, int | float) for value in values)


def _best_trial(search: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> str:
    """The name of the best trial, and whether it is one of an earlier search.

    Every search counts its trials from 1, so the name alone does not tell: a trial of this search is the best one only
    if its accuracy and its hyperparameters are the best too.
    """
    own = any(
        trial["name"] == search["best_trial"]
        and trial["best_value"] == search["best_value"]
        and trial["values"] == search.get("best", trial["values"])
        for trial in trials
    )
    return _trial_name(search["best_trial"]) + ("" if own else " of an earlier search")


def _trial_name(name: str) -> str:
    return f"trial {name.replace('_', '-').rpartition('-')[2]}"


def _cost_rows(inputs: ReportInputs) -> list[list[str]]:
    train, speed = inputs.outputs["train"], inputs.results["speed"]
    # The history has all attempts; `inputs.seconds` has the last one alone.
    hours = sum(epoch["seconds"] * epoch.get("num_workers", inputs.workers) for epoch in train["history"]) / 3600
    rows = [
        ["training, images/s (median)", f"{train['images_per_second']:,.0f}"],
        ["training workers", f"{inputs.workers}, {inputs.cpus_per_worker:g} CPU each"],
        *([["training computed on", train["device"]]] if "device" in train else []),
        ["training, core-hours", number(hours * inputs.cpus_per_worker)],
    ]
    if inputs.gpus_per_worker:
        rows.append(["training, GPU-hours", number(hours * inputs.gpus_per_worker)])
    return [
        *rows,
        ["GFLOPs per image, forward pass", number(2 * inputs.macs_per_image / 1e9)],
        ["latency for one image, median", f"{speed['batch_1_median_ms']:.2f} ms"],
        ["latency for one image, 95th percentile", f"{speed['batch_1_p95_ms']:.2f} ms"],
        ["batches of 256, images/s", f"{speed['batch_256_images_per_second']:,.0f}"],
        ["latency and throughput measured on", speed["device"]],
    ]


def _identity_rows(inputs: ReportInputs) -> list[list[str]]:
    data = inputs.outputs["preprocess"]
    rows = [["data digest (SHA-256)", data["digest"]], ["test digest (SHA-256)", data["splits"]["test"]["digest"]]]
    return [*rows, ["MLflow run", inputs.run_id]] if inputs.run_id else rows


def _readable(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
