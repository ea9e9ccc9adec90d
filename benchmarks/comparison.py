"""Accuracy of a Perceiver and of other kinds of models at the same PFLOP, on CIFAR-100, with one recipe.

    python benchmarks/comparison.py --archive cifar-100-python.tar.gz --record benchmarks/data/comparison.jsonl \\
        --pflop 0.1 0.35 0.7 --seeds 0 1 2
    python benchmarks/comparison.py --archive ... --record ... --pflop 0.1 --models cnn -- --train.learning-rate 8e-3
    python benchmarks/comparison.py --archive ... --record ... --epochs 5 --arguments '{"resize_to": 64}'
    python benchmarks/comparison.py --record benchmarks/data/comparison.jsonl    # the table of what there is

The models are in comparison_models.py. All are trained by the pipeline's own `fit` on its workers, with the data,
augmentation, optimizer and precision of the preset `cifar100`; arguments behind `--` change that, and count as other
settings. A model gets the whole number of epochs that comes nearest to the budget, so that the learning rate ends with
it: PFLOP = 6 x multiply-accumulates of an image x training rows x epochs. The multiply-accumulates are counted in the
graph of the model. With `--epochs` all models get as many images instead, whatever they cost. Warm-up is an epoch, or a
tenth of the training if that is less.

A finished training is appended to `--record`, and the same command continues with what is missing. One that was
interrupted starts again, because its time would be wrong. The time is that of accuracy.py. The test rows are read once
a run, after the training; the weights are those of the epoch with the lowest validation loss.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import json_lines
from ending import existing_file, run_benchmark
from rich.console import Console
from rich.table import Table

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pipeline.command import say_error
from pipeline.data.config import DatasetConfig
from pipeline.devices import cpu_name
from pipeline.fields import keyed
from pipeline.own_model import OwnModel, train_own_model
from pipeline.settings.command_line import parse
from pipeline.settings.config import PipelineConfig

MODELS = ("perceiver", "cnn", "resnet9", "cct", "vit")
FIELDS = ("model", "seed", "budget_pflop", "settings", "parameters", "mmacs", "test", "validation", "processor")
FLOPS_PER_MAC = 6  # multiply and add; forward pass, gradients of the activations, gradients of the weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar100", help="preset whose data and training settings all models get")
    parser.add_argument(
        "--archive", type=existing_file, help="copy of cifar-100-python.tar.gz; without it nothing is trained"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--arguments", type=json_object, default={}, help='of the builders, as JSON: {"widths": [32, 64]}'
    )
    parser.add_argument("--pflop", type=float, nargs="+", default=[0.1], help="budgets of a training")
    parser.add_argument("--epochs", type=int, help="of every training, instead of a budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--record", type=Path, required=True, help="JSON lines file of finished trainings")
    parser.add_argument("given", nargs="*", help="further arguments of pipeline/run.py, behind --")
    args = parser.parse_args()
    if wrong := [pflop for pflop in args.pflop if not 0 < pflop < math.inf]:
        parser.error(f"--pflop {wrong[0]:g}: give positive budgets")
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: give at least 1")
    if unused := [option for option in args.given if option.startswith("--model.")]:
        parser.error(f"{unused[0]} changes none of these models: give --arguments of their builders")
    from accuracy import archive_arguments  # not before: it imports Ray, which reads what `run_command` sets

    trains = bool(args.archive) or args.preset == "quickstart"
    rows = (json_lines.begin if trains else json_lines.read)(args.record, FIELDS)
    if trains:
        with tempfile.TemporaryDirectory(prefix="comparison-") as storage:
            given = [args.preset, *(archive_arguments(args.archive) if args.archive else []), "--storage", storage]
            given += ["--search.num-trials", "0", "--evaluation.corruption-rows", "0", *args.given]
            base = parse(given)[1].config
            for budget in args.pflop if args.epochs is None else [args.epochs]:
                for name in args.models:
                    if code := train_missing(base, name, args.arguments, budget, args.seeds, rows, args.record):
                        return code
    show(rows)
    print(json.dumps({"benchmark": "comparison", "runs": rows}))
    return 0


def train_missing(
    base: PipelineConfig,
    name: str,
    arguments: dict[str, Any],
    budget: float | int,
    seeds: list[int],
    rows: list[dict[str, Any]],
    record: Path,
) -> int:
    """Trains a model with those seeds that are not among `rows`, and adds them there and to the file `record`.

    Returns 0, or the exit code of a training that was stopped or failed, after saying so.

    Args:
        base: Settings of the data and the training.
        name: One of `MODELS`.
        arguments: Further arguments of its builder.
        budget: Epochs if it is an integer, else PFLOP.
        seeds: Seeds of the training.
        rows: Finished trainings.
        record: File of finished trainings.
    """
    import comparison_models

    from pipeline.workflow.task import Stopped, TaskFailed

    model = OwnModel(comparison_models.BUILDERS[name], arguments)
    size = size_of(replace(model, image_shape=base.model.image_shape, num_classes=base.model.num_classes))
    in_epochs = isinstance(budget, int)
    epochs = budget if isinstance(budget, int) else epochs_for(budget, size["macs"], base.training_rows)
    for seed in seeds:
        train = replace(
            base.train,
            epochs=epochs,
            early_stopping_patience=epochs,
            warmup_epochs=min(base.train.warmup_epochs, 0.1 * epochs),
            seed=seed,
        )
        config = replace(base, train=train)
        settings = settings_of(config, arguments)
        if any((row["model"], row["settings"]) == (name, settings) and is_of_size(row, size) for row in rows):
            continue
        try:
            result = train_own_model(config, model)
        except Stopped as stopped:
            say_error(f"stopped: the same command trains {name} with seed {seed} from the beginning")
            return 128 + stopped.signal
        except TaskFailed as failed:
            say_error(f"error: {failed}")
            return 1
        history, found = result["train"]["history"], result["evaluate"]
        assert found["macs_per_image"] == size["macs"]
        row = {
            "model": name,
            "seed": seed,
            "budget_pflop": None if in_epochs else budget,
            "pflop": FLOPS_PER_MAC * size["macs"] * base.training_rows * epochs / 1e15,
            "epochs": epochs,
            "settings": settings,
            "parameters": found["parameters"],
            "mmacs": size["macs"] / 1e6,
            "test": {score: found[score] for score in ("top1", "top5", "loss", "num_examples")},
            "validation": {score: found["validation"][score] for score in ("top1", "top5", "loss")},
            "training_seconds": sum(epoch["seconds"] + epoch["checkpoint_seconds"] for epoch in history),
            "images_per_second": result["train"]["images_per_second"],
            "processor": processor(result["train"]),
            "curve": [{k: epoch[k] for k in ("loss", "val_loss", "val_accuracy")} for epoch in history],
        }
        json_lines.add(record, row)
        rows.append(row)
        print(f"{name}, {row['pflop']:.3f} PFLOP, seed {seed}: {row['test']['top1']:.2%}", file=sys.stderr, flush=True)
    return 0


def is_of_size(row: dict[str, Any], size: dict[str, int]) -> bool:
    """Whether a row is of the model as it is now: a preset changes, and its name stays.

    How multiply-accumulates are counted has changed by less than a thousandth.
    """
    return row["parameters"] == size["parameters"] and math.isclose(1e6 * row["mmacs"], size["macs"], rel_tol=1e-3)


def json_object(text: str) -> dict[str, Any]:
    """Type of an option that is a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return found


def processor(trained: dict[str, Any]) -> str:
    """What computed a training that `train_own_model` returned: the GPU, or the processor with all its cores."""
    return trained["device"] if trained["gpus_per_worker"] else f"{cpu_name()}, {os.cpu_count()} cores"


def size_of(model: OwnModel) -> dict[str, int]:
    """Multiply-accumulates of an image and parameters of a model.

    Raises:
        ValueError: if the builder does not take the arguments, or the multiply-accumulates are not known, from which
            the number of epochs follows.
    """
    from pipeline.training.macs import count_macs
    from pipeline.training.models import build_model
    from pipeline.training.worker import OwnModelError

    try:
        built = build_model(model)
    except OwnModelError as error:
        raise ValueError(f"--arguments {json.dumps(model.arguments)}: {error}") from error
    macs = count_macs(built, model.image_shape)
    if macs is None:
        raise ValueError(f"the multiply-accumulates of {model.name} cannot be counted: give it no loops or conditions")
    return {"macs": macs, "parameters": built.count_params()}


def epochs_for(pflop: float, macs: int, rows: int) -> int:
    """The whole number of epochs that comes nearest to a budget, at least one."""
    return max(1, round(pflop * 1e15 / (FLOPS_PER_MAC * macs * rows)))


def settings_of(config: PipelineConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """What decides the result of a training and, by the workers, its duration.

    Of the data, what differs from the default: other splits are other rows.
    """
    train = keyed(config.train) | {name: getattr(config.train, name) for name in ("num_workers", "cpus_per_worker")}
    if config.train.use_gpu:
        train["use_gpu"] = True
    defaults = {field.name: field.default for field in fields(DatasetConfig)}
    data = {name: getattr(config.data, name) for name in ("source", "sha256", "seed")}
    data |= {name: value for name, value in keyed(config.data).items() if value != defaults[name]}
    return json.loads(json.dumps({"data": data, "train": train, "arguments": arguments}))  # tuples become lists


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a row for each model and settings: means over its seeds, with the lowest and the highest value."""
    from accuracy import spread

    columns = ("model", "parameters", "MMAC", "epochs", "PFLOP", "minutes", "images/s", "processor", "seeds", "top-1")
    table = Table(*columns, "top-5", "validation", title="top-1 and top-5: of the test images")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["budget_pflop"] or 0, MODELS.index(row["model"]))):
        settings = row["settings"] | {"train": {k: v for k, v in row["settings"]["train"].items() if k != "seed"}}
        groups.setdefault(json.dumps([row["model"], row["budget_pflop"], row["processor"], settings]), []).append(row)
    for own in groups.values():
        first = own[0]
        table.add_row(
            first["model"] + (f" {first['settings']['arguments']}" if first["settings"]["arguments"] else ""),
            f"{first['parameters']:,}",
            f"{first['mmacs']:.1f}",
            str(first["epochs"]),
            f"{first['pflop']:.3g}",
            spread([row["training_seconds"] / 60 for row in own], "{:.1f}"),
            f"{statistics.median(row['images_per_second'] for row in own):.4g}",
            first["processor"],
            ", ".join(str(row["seed"]) for row in own),
            *(spread([row["test"][top] for row in own], "{:.2%}") for top in ("top1", "top5")),
            spread([row["validation"]["top1"] for row in own], "{:.2%}"),
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    run_benchmark(main)
