"""The summary of a run, as a table and as JSON, and the plan that a dry run prints."""

import shlex
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perceiver import cost
from pipeline.masking import masked
from pipeline.settings.command_line import Options
from pipeline.settings.config import PipelineConfig, flatten, trained_configs
from pipeline.storage import Storage
from pipeline.tracking.outbox import Unsent
from pipeline.workflow.run import Run
from pipeline.workflow.task import Manifest

NEWEST_REPORT = "report.html"
"""Storage path of a copy of the report of the command that was given last."""


def summarize(
    preset: str,
    config: PipelineConfig,
    manifests: dict[str, Manifest],
    cached: set[str],
    run_id: str | None = None,
    unsent: Unsent | None = None,
) -> dict[str, Any]:
    """The summary of a run, without passwords and keys; the parts of tasks not among `manifests` are missing."""
    outputs = {name: manifest["output"] for name, manifest in manifests.items()}
    summary: dict[str, Any] = {
        "preset": preset,
        "tasks": {
            name: {
                "state": "cached" if name in cached else "done",
                "seconds": manifest["seconds"],
                "key": manifest["key"],
            }
            for name, manifest in manifests.items()
        },
        "mlflow": {
            "tracking_uri": config.tracking_uri,
            "experiment": config.tracking.experiment,
            "run_id": run_id,
            "unsent": str(unsent) if unsent else None,
        },
    }
    if "preprocess" in outputs:
        summary["dataset"] = {"digest": outputs["preprocess"]["digest"]}
    if "search" in outputs:
        found = outputs["search"]
        summary["search"] = {"num_trials": len(found["trials"]), "best": found["best"]}
    if "train" in outputs:
        trained = outputs["train"]
        model, _ = trained_configs(config, searched=outputs["search"])
        summary["train"] = {
            name: trained[name] for name in ("images_per_second", "epochs", "best_epoch", "num_workers")
        } | {"parameters": cost.parameter_count(model)}
    if "evaluate" in outputs:
        scores = outputs["evaluate"]
        # Evaluations of earlier versions have no balanced accuracy.
        names = [name for name in ("top1", "top5", "balanced_accuracy", "loss", "num_examples") if name in scores]
        summary["test"] = {name: scores[name] for name in names}
    if "register" in outputs:
        registered = outputs["register"]
        summary["model"] = {name: registered[name] for name in ("name", "version", "alias", "uri")}
        summary["mlflow"]["run_id"] = registered["run_id"]
        # The run may be that of a command with another experiment. Earlier versions of this project do not say which.
        summary["mlflow"]["experiment"] = registered.get("experiment", config.tracking.experiment)
        given = asdict(config.promotion)
        used = registered.get("promotion", given)
        if used != given:
            summary["model"]["decided_with"] = {name: used[name] for name in used if used[name] != given.get(name)}
    if "report" in outputs:
        summary["report"] = Storage(config.storage).absolute(NEWEST_REPORT)
    return masked(summary)


def show_summary(summary: dict[str, Any], console: Console) -> None:
    table = Table(title=escape(summary["preset"]), show_header=False)
    test, model, search = summary.get("test"), summary.get("model"), summary.get("search")
    for name, task in summary["tasks"].items():
        table.add_row(name, "done before" if task["state"] == "cached" else f"done in {task['seconds']:.1f} s")
    if test:
        table.add_row("test top-1", f"{test['top1']:.2%} of {test['num_examples']} images")
        table.add_row("test top-5", f"{test['top5']:.2%}")
        if "balanced_accuracy" in test:
            table.add_row("test balanced accuracy", f"{test['balanced_accuracy']:.2%}")
        table.add_row("test loss", f"{test['loss']:.4f}")
    if search and search["best"]:
        table.add_row("best of search", ", ".join(f"{name} = {value:.4g}" for name, value in search["best"].items()))
    if train := summary.get("train"):
        table.add_row(
            "training",
            f"{train['images_per_second']:.0f} images/s on {train['num_workers']} workers, {train['epochs']} epochs, "
            f"{train['parameters']:,} parameters",
        )
    if model:
        table.add_row("registered model", escape(f"{model['uri']} ({model['name']}@{model['alias']})"))
        if other := model.get("decided_with"):
            settings = ", ".join(f"promotion.{name} = {value:g}" for name, value in other.items())
            table.add_row("decided before with", f"{settings}; what is given now counts for the next version")
    runs = summary["mlflow"]
    table.add_row("runs", escape(f"experiment {runs['experiment']}, run {runs['run_id']}"))
    table.add_row("to look at them", escape(mlflow_command(runs["tracking_uri"])))
    console.print(table)
    if report := summary.get("report"):
        console.print(escape(f"report: {report}"), soft_wrap=True)


def mlflow_command(tracking_uri: str) -> str:
    """The command that shows the runs in a browser."""
    if tracking_uri.startswith(("http://", "https://")):
        return f"open {tracking_uri}"
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"


def show_plan(preset: str, options: Options, run: Run[PipelineConfig], console: Console) -> None:
    """Prints the settings, the tasks and what the model costs; starts nothing."""
    config = run.config
    settings = Table("setting", "value", title=f"{preset}")
    for name, value in flatten(config).items():
        settings.add_row(name, escape(str(value)))
    console.print(settings)
    if config.data.source == "files":
        from pipeline.driver.image_plan import show_images

        show_images(config.data, run.storage, console)
    tasks = Table("task", "key", "state", "takes", title="tasks")
    finished, wanted = run.done().keys() - run.following(options.force), True
    for task in run.tasks:
        state = "done" if task.name in finished else "to do" if wanted else "left out"
        tasks.add_row(task.name, run.keys[task.name], state, task.resources(config))
        wanted = wanted and task.name != options.until
    console.print(tasks)
    macs = cost.macs_per_image(config.model)
    console.print(
        f"model: {cost.parameter_count(config.model):,} parameters, about {2 * macs / 1e9:.3f} GFLOPs an image "
        f"({macs / 1e6:.1f} MMAC) forward, three times that in training"
    )
    train = config.train
    rows = config.training_rows * train.epochs
    kept = cost.activation_bytes_per_image(config.model) * train.global_batch_size
    kept //= 1 if train.precision == "float32" else 2
    workers = f"{train.max_workers} workers" if train.max_workers > 1 else "the worker"
    console.print(
        f"training: {train.epochs} epochs, {rows:,} images, about {6 * macs * rows / 1e15:.3g} PFLOPs; activations of "
        f"a step about {kept / 2**20:,.0f} MiB, shared by {workers}"
    )
