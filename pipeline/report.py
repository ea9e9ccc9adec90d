"""One page about a run for a person: how good the model is, where it errs, where it looks, and what it took.

`render` makes it of what the tasks left; it needs neither Keras nor a network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import figures, page
from pipeline import report_evaluation as sections
from pipeline.figures import percent


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        title: what was trained, in words.
        outputs: of the tasks preprocess, search, train, evaluate and register, by name.
        seconds: that each task took, by name.
        settings: the resolved settings, `section.field` to value.
        results: what `pipeline.evaluate.evaluate` found.
        pictures: its pictures.
        parameters, macs_per_image: of the trained model.
        workers, cpus_per_worker, gpus_per_worker: that trained it.
        run_id: MLflow's, if there is one.
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


def render(record: RunRecord) -> str:
    """The page as HTML, complete in itself."""
    results, pictures = record.results, record.pictures
    return page.document(
        record.title,
        _lead(record),
        {
            "Learning curves": _learning_curves(record),
            "Search": _search(record),
            "Classes": sections.classes(results, pictures),
            "Confusion": sections.confusion(results),
            "Most confident mistakes": sections.mistakes(results, pictures),
            "Calibration": sections.calibration(results),
            "Robustness": sections.robustness(results),
            "Where the model looks": sections.attention(results, pictures),
            "Speed and cost": _cost(record),
            "Settings": _settings(record),
        },
    )


def _lead(record: RunRecord) -> str:
    results, test = record.results, record.results["test"]
    model = record.outputs.get("register", {})
    splits = record.outputs["preprocess"]["splits"]
    words = [f"{splits['train']['rows']:,} training, {splits['validation']['rows']:,} validation and "]
    words.append(f"{splits['test']['rows']:,} test images of {len(results['label_names'])} classes.")
    if model:
        words.append(f" Registered as {model['uri']}")
        words.append(f" ({model['name']}@{model['alias']})." if model.get("alias") else ".")
        words.append(f" {model['reason'][:1].upper()}{model['reason'][1:]}." if model.get("reason") else "")
    half_width = 1.96 * math.sqrt(test["top1"] * (1 - test["top1"]) / test["num_examples"])
    tiles = {
        f"test top-1, ± {100 * half_width:.1f} (95%)": f"{100 * test['top1']:.1f}%",
        "test top-5": f"{100 * test['top5']:.1f}%",
        "test loss, in nats": f"{test['loss']:.3f}",
        "calibration error, after temperature scaling": f"{100 * results['calibration']['after']['ece']:.1f}%",
    }
    if robustness := results["robustness"]:
        tiles["top-1 on corrupted images, mean"] = f"{100 * robustness['mean_top1']:.1f}%"
    tiles |= {
        "an image alone, median": f"{results['speed']['batch_1_median_ms']:.1f} ms",
        "parameters": _short(record.parameters),
        "GFLOPs an image": figures.number(2 * record.macs_per_image / 1e9),
    }
    return page.soft("".join(words)) + page.tiles(tiles)


def _learning_curves(record: RunRecord) -> str:
    history = record.outputs["train"]["history"]

    def curves(names: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
        return {
            title: [(epoch["epoch"], float(epoch[name])) for epoch in history if name in epoch]
            for name, title in names.items()
        }

    few = len(history) < 12
    charts = [
        page.figure(
            "Loss",
            figures.line_chart(
                curves({"loss": "training", "val_loss": "validation"}), x_label="epoch", y_label="loss", markers=few
            ),
            "Training loss with augmentation, dropout and label smoothing, where they are on.",
        ),
        page.figure(
            "Accuracy",
            figures.line_chart(
                curves({"accuracy": "training", "val_accuracy": "validation"}),
                x_label="epoch",
                y_label="top-1",
                y_format=percent,
                markers=few,
            ),
        ),
    ]
    if any("learning_rate" in epoch for epoch in history):
        charts.append(
            page.figure(
                "Learning rate",
                figures.line_chart(
                    curves({"learning_rate": "learning rate"}), x_label="epoch", y_label="learning rate", markers=few
                ),
            )
        )
    charts.append(
        page.figure(
            "Throughput",
            figures.line_chart(
                curves({"images_per_second": "images/s"}), x_label="epoch", y_label="training images/s", markers=few
            ),
        )
    )
    best = record.outputs["train"]["best_epoch"]
    return page.soft(f"The weights of epoch {best}, that of the lowest validation loss, are the model.") + page.columns(
        *charts
    )


def _search(record: RunRecord) -> str:
    search = record.outputs.get("search", {})
    trials = [trial for trial in search.get("trials", ()) if trial.get("best_value") is not None]
    if not trials:
        return ""
    names = [name for name in trials[0]["values"] if _is_searched(name, trials)]
    costs = {"GFLOPs an image": "gflops"}
    marked = _trial_name(search["best_trial"])

    def chart(title: str, values: Sequence[float]) -> str:
        points = {_trial_name(trial["name"]): (x, trial["best_value"]) for trial, x in zip(trials, values, strict=True)}
        svg = figures.scatter_chart(
            points,
            x_label=title,
            y_label="validation top-1",
            y_format=percent,
            log_x=min(values) > 0 and max(values) / min(values) >= 8,
            marked=marked,
        )
        return page.figure(title, svg)

    charts = [chart(name, [trial["values"][name] for trial in trials]) for name in names]
    charts += [chart(title, [trial[key] for trial in trials]) for title, key in costs.items()]
    best_so_far = np.maximum.accumulate([trial["best_value"] for trial in trials])
    line = {"best so far": [(float(n), float(value)) for n, value in enumerate(best_so_far, 1)]}
    charts.append(
        page.figure(
            "Best so far",
            figures.line_chart(line, x_label="trials", y_label="validation top-1", y_format=percent, markers=True),
        )
    )
    rows = [
        [
            _trial_name(trial["name"]),
            *(_value(trial["values"][name]) for name in names),
            len(trial["history"]),
            trial["status"],
            percent(round(trial["best_value"], 4)),
        ]
        for trial in sorted(trials, key=lambda trial: -trial["best_value"])
    ]
    failed = len(search["trials"]) - len(trials)
    words = f"{len(search['trials'])} trials" + (f", of which {failed} gave no value" if failed else "")
    words += f". The best, {marked}, reached a validation top-1 of {percent(round(search['best_value'], 4))} and was "
    words += "trained in full."
    listed = page.table(["trial", *names, "epochs", "status", "validation top-1"], rows)
    return page.soft(words) + page.columns(*charts) + page.details(f"All {len(rows)} trials with a value", listed)


def _is_searched(name: str, trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is a number that differs between trials."""
    values = [trial["values"].get(name) for trial in trials]
    return len(set(values)) > 1 and all(isinstance(value, int | float) for value in values)


def _trial_name(name: str) -> str:
    """Without what all trials of a search begin with."""
    return f"trial {name.replace('_', '-').rpartition('-')[2]}"


def _cost(record: RunRecord) -> str:
    train, speed = record.outputs["train"], record.results["speed"]
    hours = record.seconds["train"] * record.workers / 3600
    core_hours = hours * record.cpus_per_worker
    rows = [
        ["training, images/s (median)", f"{train['images_per_second']:,.0f}"],
        ["training workers", f"{record.workers}, {record.cpus_per_worker:g} CPU each"],
        ["training, core-hours", figures.number(core_hours)],
    ]
    if record.gpus_per_worker:
        rows.append(["training, GPU-hours", figures.number(hours * record.gpus_per_worker)])
    rows += [
        ["GFLOPs an image, forward", figures.number(2 * record.macs_per_image / 1e9)],
        ["an image alone, median", f"{speed['batch_1_median_ms']:.2f} ms"],
        ["an image alone, 95th percentile", f"{speed['batch_1_p95_ms']:.2f} ms"],
        ["batches of 256, images/s", f"{speed['batch_256_images_per_second']:,.0f}"],
        ["both on", speed["device"]],
    ]
    tasks = [[name, f"{seconds:,.1f} s"] for name, seconds in record.seconds.items()]
    note = page.soft("Of the attempt that ended the task; training without earlier attempts that were cut off.")
    return page.columns(
        f"<div><h3>Model</h3>{page.table(['', ''], rows)}</div>",
        f"<div><h3>Tasks, wall-clock</h3>{page.table(['', ''], tasks)}{note}</div>",
    )


def _settings(record: RunRecord) -> str:
    data = record.outputs["preprocess"]
    facts = [
        ["data digest (SHA-256)", data["digest"]],
        ["test digest (SHA-256)", data["splits"]["test"]["digest"]],
        *([["MLflow run", record.run_id]] if record.run_id else []),
    ]
    settings = [[name, _value(value)] for name, value in record.settings.items()]
    return page.table(["", ""], facts, numbers=False) + page.details(
        f"All {len(settings)} settings, as they were trained", page.table(["", ""], settings, numbers=False)
    )


def _value(value: Any) -> str:
    return figures.number(value) if isinstance(value, float) else str(value)


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
