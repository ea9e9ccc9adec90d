"""The tasks of the pipeline, each a few lines that call the rooms that do the work.

Rooms that import TensorFlow, Keras or MLflow are imported inside the tasks: the driver, which only starts them, stays
quick, and a run whose tasks are all done ends in a moment.
"""

import functools
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import ModelConfig, PipelineConfig, TrainingConfig, keyed
from pipeline.workflow import Context, Task

MODEL_FILE, PREDICTIONS_FILE = "model.keras", "predictions.npz"
INPUT_EXAMPLE_ROWS = 4


def trained_configs(
    config: PipelineConfig, data: dict[str, Any] | None = None, searched: dict[str, Any] | None = None
) -> tuple[ModelConfig, TrainingConfig]:
    """The settings that are trained: those of `config`, with the data's statistics and what the search found."""
    model, train = config.model, config.train
    if data:
        model = replace(model, pixel_mean=tuple(data["pixel_mean"]), pixel_std=tuple(data["pixel_std"]))
    if best := (searched or {}).get("best"):
        from tune.space import LEARNING_RATE, to_model

        model = to_model(best, model)
        train = replace(train, learning_rate=best.get(LEARNING_RATE, train.learning_rate))
    return model, train


def ingest(context: Context) -> dict[str, Any]:
    from pipeline import preprocess

    return preprocess.ingest(context.config.data, context.storage, context.out)


def preprocess(context: Context) -> dict[str, Any]:
    from pipeline import preprocess

    return preprocess.preprocess(context.config.data, context.inputs["ingest"], context.storage, context.out)


def search(context: Context) -> dict[str, Any]:
    if not context.config.search.num_trials:
        return {"best": None, "trials": []}
    from pipeline.preprocess import materialize_split, to_arrays
    from tune.search import search

    manifest = context.inputs["preprocess"]
    data = tuple(to_arrays(materialize_split(manifest, split, context.storage)) for split in ("train", "validation"))
    settings = context.config.search
    model, train = trained_configs(context.config, manifest)
    train = replace(train, epochs=settings.epochs, num_workers=1, cpus_per_worker=settings.cpus_per_trial)
    # A trial has a checkpoint at the end of each epoch, where Tune takes one.
    train = replace(train, checkpoint_every_steps=0)
    driver = functools.partial(_run_trial, model=model, train=train, board=context.board)
    return search(driver, data, settings, storage_path=context.storage.absolute(context.state), name="tune")


def _run_trial(sample, data, *, trial, report, resume_from, model, train, board) -> None:  # type: ignore[no-untyped-def]
    """A `tune.search.TrialDriver` once the last three are bound."""
    from pipeline.train import train_in_process
    from tune.space import LEARNING_RATE, to_model

    def report_and_post(metrics: dict[str, Any], folder: Path | None) -> None:
        if "epoch" in metrics:
            board.post(task="search", trial=trial, values=sample, metrics=metrics)
        report(metrics, folder)

    train_in_process(
        to_model(sample, model),
        replace(train, learning_rate=sample.get(LEARNING_RATE, train.learning_rate)),
        *data,
        report=report_and_post,
        resume_from=resume_from,
    )


def train(context: Context) -> dict[str, Any]:
    from pipeline.train import train

    manifest = context.inputs["preprocess"]
    model, settings = trained_configs(context.config, manifest, context.inputs["search"])
    output = train(model, settings, manifest, context.storage, state=context.state, board=context.board)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / MODEL_FILE
        context.storage.download(f"{output.pop('checkpoint')}/{MODEL_FILE}", local)
        context.storage.upload(local, f"{context.out}/{MODEL_FILE}")
        return output | {"model": {"path": f"{context.out}/{MODEL_FILE}", "sha256": _sha256(local)}}


def evaluate(context: Context) -> dict[str, Any]:
    import keras
    import numpy as np

    import perceiver.model  # noqa: F401  registers its classes with Keras
    from pipeline.evaluate import evaluate
    from pipeline.preprocess import materialize_split, to_arrays

    test = to_arrays(materialize_split(context.inputs["preprocess"], "test", context.storage))
    with tempfile.TemporaryDirectory() as folder:
        model = keras.saving.load_model(_fetch_model(context, folder), compile=False)
        metrics, probabilities = evaluate(model, test)
        predictions = Path(folder) / PREDICTIONS_FILE
        np.savez_compressed(predictions, row_ids=test.row_ids, labels=test.labels, probabilities=probabilities)
        context.storage.upload(predictions, f"{context.out}/{PREDICTIONS_FILE}")
    return metrics | {"predictions": f"{context.out}/{PREDICTIONS_FILE}"}


def register(context: Context) -> dict[str, Any]:
    from pipeline.preprocess import materialize_split, to_arrays
    from pipeline.tracking import Tracker, register

    config, manifest = context.config, context.inputs["preprocess"]
    tracker = Tracker(config.tracking_uri, config.tracking.experiment, config.artifact_location)
    run_id = tracker.find_run(context.run_identity)
    assert run_id is not None, "the driver makes the run before it starts a task"
    test = to_arrays(materialize_split(manifest, "test", context.storage))
    scores = context.inputs["evaluate"]
    with tempfile.TemporaryDirectory() as folder:
        registered = register(
            tracker,
            model_path=_fetch_model(context, folder),
            name=config.tracking.model_name,
            identity=f"{context.run_identity}/register",
            run_id=run_id,
            input_example=test.images[:INPUT_EXAMPLE_ROWS],
            label_names=manifest["label_names"],
            alias=config.tracking.alias,
            tags={
                "dataset.sha256": manifest["digest"],
                "test.sha256": manifest["splits"]["test"]["digest"],
                "test.top1": f"{scores['top1']:.6f}",
                "test.top5": f"{scores['top5']:.6f}",
            },
        )
    return registered | {
        "tracking_uri": config.tracking_uri,
        "experiment": config.tracking.experiment,
        "run_id": run_id,
    }


def _is_registered_there(config: PipelineConfig, output: dict[str, Any]) -> bool:
    wanted = (config.tracking_uri, config.tracking.model_name, config.tracking.alias)
    return (output["tracking_uri"], output["name"], output["alias"]) == wanted


def _fetch_model(context: Context, folder: str) -> str:
    """Local copy of the trained model.

    Raises:
        ValueError: if its bytes are not those that were trained.
    """
    model = context.inputs["train"]["model"]
    local = Path(folder) / MODEL_FILE
    context.storage.download(model["path"], local)
    if (found := _sha256(local)) != model["sha256"]:
        raise ValueError(
            f"{context.storage.absolute(model['path'])} has SHA-256 {found}, but {model['sha256']} was written: train "
            "again with --force train"
        )
    return str(local)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _trials(config: PipelineConfig) -> str:
    if not config.search.num_trials:
        return "nothing: the search is off"
    return f"{config.search.num_trials} trials, {config.search.cpus_per_trial:g} CPU each"


def _workers(config: PipelineConfig) -> str:
    gpu = " and a GPU" if config.train.use_gpu else ""
    least, most = config.train.min_workers, config.train.max_workers
    count = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} workers, {config.train.cpus_per_worker:g} CPU{gpu} each"


def _ingest_section(config: PipelineConfig) -> dict[str, Any]:
    own_split = {"test_fraction": config.data.test_fraction, "seed": config.data.seed}
    return {"source": config.data.source, "sha256": config.data.sha256} | (
        own_split if config.data.source == "digits" else {}
    )


TASKS = (
    Task("ingest", 1, (), _ingest_section, ingest, lambda config: "1 process"),
    Task("preprocess", 1, ("ingest",), lambda config: keyed(config.data), preprocess, lambda config: "all free CPUs"),
    Task(
        "search",
        1,
        ("preprocess",),
        lambda config: (
            # A trial has the search's number of epochs.
            {
                "model": keyed(config.model),
                "train": keyed(replace(config.train, epochs=1)),
                "search": keyed(config.search),
            }
            if config.search.num_trials
            else {}
        ),
        search,
        _trials,
    ),
    Task(
        "train",
        1,
        ("preprocess", "search"),
        lambda config: {"model": keyed(config.model), "train": keyed(config.train)},
        train,
        _workers,
        stoppable=True,
    ),
    Task("evaluate", 1, ("preprocess", "train"), lambda config: {}, evaluate, lambda config: "1 process"),
    Task(
        "register",
        1,
        ("preprocess", "train", "evaluate"),
        lambda config: {},
        register,
        lambda config: "1 process",
        is_current=_is_registered_there,
    ),
)
