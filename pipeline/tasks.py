"""The tasks of the pipeline, each a few lines that call the rooms that do the work.

Rooms that import TensorFlow, Keras or MLflow are imported inside the tasks: the driver, which only starts them, stays
quick, and a run whose tasks are all done ends in a moment.
"""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import ModelConfig, PipelineConfig, TrainingConfig, flatten, keyed
from pipeline.workflow import Context, Task, done

MODEL_FILE, EVALUATION_FILE, REPORT_FILE = "model.keras", "evaluation.json", "report.html"
INPUT_EXAMPLE_ROWS = 4


def trained_configs(
    config: PipelineConfig, data: dict[str, Any] | None = None, searched: dict[str, Any] | None = None
) -> tuple[ModelConfig, TrainingConfig]:
    """The settings that are trained: those of `config`, with the data's statistics and what the search found."""
    model, train = config.model, config.train
    if data:
        model = replace(model, pixel_mean=tuple(data["pixel_mean"]), pixel_std=tuple(data["pixel_std"]))
    if best := (searched or {}).get("best"):
        from tune.space import to_model, training_values

        model, train = to_model(best, model), replace(train, **training_values(best))
    return model, train


def ingest(context: Context) -> dict[str, Any]:
    from pipeline import preprocess

    return preprocess.ingest(context.config.data, context.storage, context.out)


def preprocess(context: Context) -> dict[str, Any]:
    from pipeline import preprocess

    return preprocess.preprocess(context.config.data, context.inputs["ingest"], context.storage, context.out)


def search(context: Context) -> dict[str, Any]:
    space = context.config.search_space()
    if space is None:
        return {"best": None, "trials": []}
    from pipeline.search_task import run_search

    model, _ = trained_configs(context.config, context.inputs["preprocess"])
    return run_search(context, replace(space, model=model))


def train(context: Context) -> dict[str, Any]:
    from pipeline.train import train

    manifest = context.inputs["preprocess"]
    model, settings = trained_configs(context.config, manifest, context.inputs["search"])
    output = train(
        model,
        settings,
        manifest,
        context.storage,
        state=context.state,
        board=context.board,
        initial_model=_initial_model(context) if settings.initial_model else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / MODEL_FILE
        context.storage.download(f"{output.pop('checkpoint')}/{MODEL_FILE}", local)
        context.storage.upload(local, f"{context.out}/{MODEL_FILE}")
        return output | {"model": {"path": f"{context.out}/{MODEL_FILE}", "sha256": _sha256(local)}}


def _initial_model(context: Context) -> str:
    """Storage path of the registered model to begin with, where all workers find it."""
    from pipeline.registered_model import fetch_file
    from pipeline.registry import RETRAIN_FILE

    uri, path = str(context.config.train.initial_model), f"{context.state}/initial.keras"
    with tempfile.TemporaryDirectory() as folder:
        context.storage.upload(fetch_file(uri, context.config.tracking_uri, RETRAIN_FILE, Path(folder)), path)
    return path


def evaluate(context: Context) -> dict[str, Any]:
    import io
    import json

    import keras
    import numpy as np

    import perceiver.model  # noqa: F401  registers its classes with Keras
    from pipeline.evaluate import evaluate
    from pipeline.predictions import write_predictions, write_verified
    from pipeline.preprocess import materialize_split, to_arrays

    manifest, storage, out = context.inputs["preprocess"], context.storage, context.out
    test, validation = (to_arrays(materialize_split(manifest, split, storage)) for split in ("test", "validation"))
    with tempfile.TemporaryDirectory() as folder:
        model = keras.saving.load_model(_fetch_model(context, folder), compile=False)
    found = evaluate(
        model, test, validation, context.config.evaluation, manifest["label_names"], manifest["coarse_label_names"]
    )
    pictures = io.BytesIO()
    np.savez_compressed(pictures, allow_pickle=False, **found.pictures)
    results, calibration = found.results, found.results["calibration"]
    return results["test"] | {
        "per_class": results["per_class"],
        "test_digest": manifest["splits"]["test"]["digest"],
        "validation": results["validation"],
        "calibration": {
            "num_bins": calibration["num_bins"],
            "temperature": calibration["temperature"],
            "ece": calibration["before"]["ece"],
            "ece_calibrated": calibration["after"]["ece"],
            "loss_calibrated": calibration["loss_after"],
        },
        "latency": results["speed"],
        "predictions": {
            "test": write_predictions(found.test, storage, f"{out}/test.parquet"),
            "validation": write_predictions(found.validation, storage, f"{out}/validation.parquet"),
        },
        "evaluation": write_verified(json.dumps(results).encode(), storage, f"{out}/{EVALUATION_FILE}"),
        "pictures": write_verified(pictures.getvalue(), storage, f"{out}/pictures.npz"),
    }


def register(context: Context) -> dict[str, Any]:
    from pipeline.predictions import read_predictions
    from pipeline.preprocess import materialize_split, to_arrays
    from pipeline.registration import TrainedModel, register_trained

    data, trained, scores = (context.inputs[name] for name in ("preprocess", "train", "evaluate"))
    model, settings = trained_configs(context.config, data, context.inputs["search"])
    with tempfile.TemporaryDirectory() as folder:
        made = TrainedModel(
            path=_fetch_model(context, folder),
            input_example=to_arrays(materialize_split(data, "test", context.storage)).images[:INPUT_EXAMPLE_ROWS],
            test=read_predictions(scores["predictions"]["test"], context.storage),
            model=model,
            train=settings,
            data=data,
            trained=trained,
            scores=scores,
        )
        return register_trained(made, context.config, context.run_identity)


def report(context: Context) -> dict[str, Any]:
    import io
    import json

    import numpy as np

    from perceiver import cost
    from pipeline.predictions import read_verified, write_verified
    from pipeline.report import RunRecord, render

    config, storage, inputs = context.config, context.storage, context.inputs
    model, training = trained_configs(config, inputs["preprocess"], inputs["search"])
    finished = done(TASKS[:-1], config, storage)
    with np.load(io.BytesIO(read_verified(inputs["evaluate"]["pictures"], storage))) as pictures:
        record = RunRecord(
            title=f"Perceiver on {config.data.source}",
            outputs=inputs,
            seconds={name: manifest["seconds"] for name, manifest in finished.items()},
            settings=flatten(replace(config, model=model, train=training)),
            results=json.loads(read_verified(inputs["evaluate"]["evaluation"], storage)),
            pictures=dict(pictures),
            parameters=cost.parameter_count(model),
            macs_per_image=cost.macs_per_image(model),
            workers=inputs["train"]["num_workers"],
            cpus_per_worker=training.cpus_per_worker,
            gpus_per_worker=int(training.use_gpu),
            run_id=inputs["register"]["run_id"],
        )
    return {"report": write_verified(render(record).encode(), storage, f"{context.out}/{REPORT_FILE}")}


def _is_registered_there(config: PipelineConfig, output: dict[str, Any]) -> bool:
    wanted = (config.tracking_uri, config.tracking.model_name, config.tracking.alias)
    return (output["tracking_uri"], output["name"], output["champion"]) == wanted


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
    workers = config.search.workers_per_trial
    each = (
        f"{workers} workers with {config.search.cpus_per_trial:g} CPU"
        if workers > 1
        else f"{config.search.cpus_per_trial:g} CPU"
    )
    return f"{config.search.num_trials} trials, {each} each"


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
        keeps_state=True,
    ),
    Task(
        "train",
        1,
        ("preprocess", "search"),
        lambda config: {"model": keyed(config.model), "train": keyed(config.train)},
        train,
        _workers,
        keeps_state=True,
        stoppable=True,
    ),
    Task(
        "evaluate",
        2,
        ("preprocess", "train"),
        lambda config: {"evaluation": keyed(config.evaluation)},
        evaluate,
        lambda config: "1 process",
    ),
    Task(
        "register",
        2,
        ("preprocess", "search", "train", "evaluate"),
        lambda config: {},
        register,
        lambda config: "1 process",
        is_current=_is_registered_there,
    ),
    Task(
        "report",
        1,
        ("preprocess", "search", "train", "evaluate", "register"),
        lambda config: {},
        report,
        lambda config: "1 process",
    ),
)
