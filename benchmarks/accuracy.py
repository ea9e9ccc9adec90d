"""Accuracy of a preset on the test images of CIFAR-100, and the duration of its training, over several seeds.

    python benchmarks/accuracy.py --archive cifar-100-python.tar.gz --record accuracy.jsonl --seeds 0 1 2
    python benchmarks/accuracy.py --archive ... --record ... --name "16 epochs" -- --train.epochs 16
    python benchmarks/accuracy.py --record accuracy.jsonl --figure docs/accuracy.svg

Each run is `python pipeline/run.py PRESET --until evaluate` in a temporary folder, with the arguments behind `--`
appended. It evaluates the test images once, after the training, without changes. A finished run is appended to
`--record` as a line, and the same command continues with the seeds that are missing. A run that was interrupted starts
again, because its training time would be wrong.

The training time is the time from the first step to the end of the last epoch, including validation and checkpoints. It
excludes the start of Ray, the preparation of the data and the evaluation.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import json_lines
from ending import existing_file, run_benchmark, run_pipeline
from rich.console import Console
from rich.table import Table

from perceiver.cost import macs_per_image, parameter_count
from pipeline.devices import cpu_name
from pipeline.fields import keyed
from pipeline.settings.command_line import parse
from pipeline.settings.config import PipelineConfig
from pipeline.storage import Storage, sha256_of_file
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run

ROOT = Path(__file__).parents[1]
PUBLISHED = 0.53  # top-1 accuracy that the Keras example reports
FIELDS = ("name", "seed", "settings", "test", "training_seconds", "curve")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar100")
    parser.add_argument(
        "--archive", type=existing_file, help="copy of cifar-100-python.tar.gz; without it nothing is trained"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", help="name of these runs in table and figure; default: the preset")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines file of finished runs")
    parser.add_argument("--figure", type=Path, help="SVG file for a figure of accuracy over operations")
    parser.add_argument("arguments", nargs="*", help="further arguments of pipeline/run.py, behind --")
    args = parser.parse_args()
    rows = (json_lines.begin if args.archive else json_lines.read)(args.record, FIELDS)
    name = args.name or args.preset
    for seed in args.seeds if args.archive else []:
        given = [args.preset, *archive_arguments(args.archive), "--train.seed", str(seed), *args.arguments]
        settings = settings_of(parse(given)[1].config)
        if any(row["name"] == name and row["settings"] == settings for row in rows):
            continue
        row = {"name": name, "seed": seed, "settings": settings} | run(given)
        json_lines.add(args.record, row)
        rows.append(row)
        print(f"{name}, seed {seed}: {row['test']['top1']:.2%}", file=sys.stderr, flush=True)
    show(rows)
    if args.figure:
        draw(rows, args.figure)
    print(json.dumps({"benchmark": "accuracy", "runs": rows}))


def archive_arguments(archive: Path) -> list[str]:
    """Command-line arguments of pipeline/run.py for this archive."""
    return ["--data.archive", str(archive), "--data.sha256", sha256_of_file(archive)]


def settings_of(config: PipelineConfig) -> dict[str, Any]:
    """The settings that decide the result of a run, and those of its workers, which decide its duration."""
    sections = {name: keyed(getattr(config, name)) for name in ("data", "model", "train")}
    sections["train"] |= {name: getattr(config.train, name) for name in ("num_workers", "cpus_per_worker", "use_gpu")}
    return json.loads(json.dumps(sections))  # tuples become lists


def run(given: list[str]) -> dict[str, Any]:
    """Runs the pipeline; returns its validation curve, its test metrics and its durations."""
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        given = [*given, "--storage", folder]
        summary_json = Path(folder) / "summary.json"
        command = [sys.executable, str(ROOT / "pipeline" / "run.py"), *given, "--until", "evaluate"]
        run_pipeline([*command, "--summary-json", str(summary_json)], stdout=sys.stderr)
        config = parse(given)[1].config
        key = Run(TASKS, config, Storage(config.storage)).keys["train"]
        trained = json.loads((Path(folder) / "tasks" / "train" / key / "manifest.json").read_text())
        summary = json.loads(summary_json.read_text())
    clock, curve = 0.0, []
    for epoch in trained["output"]["history"]:
        clock += epoch["seconds"] + epoch["checkpoint_seconds"]
        curve.append(
            {"seconds": clock}
            | {k: epoch[k] for k in ("loss", "val_loss", "val_accuracy", "val_top5_accuracy", "images_per_second")}
        )
    return {
        "test": summary["test"],
        "training_seconds": clock,
        "task_seconds": trained["seconds"],
        "epochs": len(curve),
        "best_epoch": trained["output"]["best_epoch"],
        "parameters": parameter_count(config.model),
        "mmacs": macs_per_image(config.model) / 1e6,
        "pflop": 6 * macs_per_image(config.model) * config.training_rows * len(curve) / 1e15,
        "machine": f"{os.cpu_count()} cores, {cpu_name()}",
        "device": trained["output"]["device"],
        "curve": curve,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a row per name and settings: means over the seeds, with the lowest and the highest value."""
    table = Table("runs", "seeds", "epochs", "PFLOP", "parameters", "minutes", "images/s", "test top-1", "test top-5")
    for own in grouped(rows):
        minutes = [row["training_seconds"] / 60 for row in own]
        speeds = [point["images_per_second"] for row in own for point in row["curve"]]
        table.add_row(
            own[0]["name"],
            ", ".join(str(row["seed"]) for row in own),
            f"{own[0]['epochs']:.3g}",
            f"{own[0]['pflop']:.2f}",
            f"{own[0]['parameters']:,}",
            spread(minutes, "{:.1f}"),
            f"{statistics.median(speeds):.4g}",
            *(spread([row["test"][top] for row in own], "{:.2%}") for top in ("top1", "top5")),
        )
    Console(width=150).print(table)


def grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs of each name and settings, which differ in their seeds only, in the order of the record.

    Runs that share a name alone are not averaged: it is the preset's unless one is given, whatever changes it.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        train = {name: value for name, value in row["settings"].get("train", {}).items() if name != "seed"}
        settings = row["settings"] | {"train": train}
        groups.setdefault(json.dumps([row["name"], settings], sort_keys=True), []).append(row)
    return list(groups.values())


def spread(values: list[float], form: str) -> str:
    """Mean of values, with the lowest and the highest if there are several."""
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the validation accuracy of each run over its operations, with the test accuracy as a point at the end.

    Operations are the same on every machine, minutes are not.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"  # the same runs give the same bytes
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    groups = grouped(rows)
    colours = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"]
    for row in rows:
        number, own = next((number, own) for number, own in enumerate(groups) if row in own)
        colour = colours(number)
        epochs = len(row["curve"])
        pflop = [row["pflop"] * epoch / epochs for epoch in range(epochs + 1)]
        accuracy = [1 / 100, *(point["val_accuracy"] for point in row["curve"])]
        label = row["name"] if row is own[0] else None
        axes.plot(pflop, accuracy, color=colour, linewidth=1, label=label)
        axes.plot(pflop[-1], row["test"]["top1"], "o", color=colour, markersize=5)
    axes.axhline(PUBLISHED, color="grey", linestyle="--", linewidth=1)
    note = "reported by the published example, 40 epochs on a V100"
    axes.text(0.99, PUBLISHED - 0.03, note, color="grey", size=8, ha="right", transform=axes.get_yaxis_transform())
    operations = "PFLOP of training: 6 x multiply-accumulates x images"
    axes.set(xlabel=operations, ylabel="top-1 accuracy", xlim=(0, None), ylim=(0, 0.8))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", title="validation; points: test")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    run_benchmark(main)
