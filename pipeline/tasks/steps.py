"""What each task does: a few lines that call the packages that do the work.

Modules that import TensorFlow, Keras or MLflow are imported inside the functions. The driver, which only starts the
tasks, stays quick, and a run whose tasks are all done ends in a moment.
"""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perceiver.config import PerceiverConfig
from pipeline.settings.config import PipelineConfig, flatten, trained_configs
from pipeline.tasks.events import Said
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel
from pipeline.workflow import task

Context = task.Context[PipelineConfig]
MODEL_FILE, EVALUATION_FILE, REPORT_FILE = "model.keras", "evaluation.json", "report.html"
INPUT_EXAMPLE_ROWS = 4


def ingest(context: Context) -> dict[str, Any]:
    from pipeline.data.ingest import ingest

    def say(line: str) -> None:
        context.channel.report(Said("ingest", line))

    return ingest(context.config.data, context.storage, context.out, say, context.channel.report)


def preprocess(context: Context) -> dict[str, Any]:
    from pipeline.data.preprocess import preprocess

    ingested, report = context.inputs["ingest"], context.channel.report
    return preprocess(context.config.data, ingested, context.storage, context.out, report)


def search(context: Context) -> dict[str, Any]:
    space = context.config.search_space()
    if space is None:
        return {"best": None, "trials": []}
    from pipeline.tasks.search import run_search

    model, _ = trained_configs(context.config, context.inputs["preprocess"])
    return run_search(context, replace(space, model=model))


def train(context: Context) -> dict[str, Any]:
    model, settings = trained_configs(context.config, context.inputs["preprocess"], context.inputs["search"])
    return train_model(context, model, settings)


def train_model(context: Context, model: PerceiverConfig | OwnModel, settings: TrainingConfig) -> dict[str, Any]:
    """Trains on the rows of `preprocess`; the output has the storage path and digest of the model's file."""
    from pipeline.workers.train import train

    manifest = context.inputs["preprocess"]
    output = train(
        model,
        settings,
        manifest,
        context.storage,
        state=context.state,
        channel=context.channel,
        initial_model=_initial_model(context) if settings.initial_model else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / MODEL_FILE
        context.storage.download(f"{output.pop('checkpoint')}/{MODEL_FILE}", local)
        # This setting is in no key, so a later command that takes this training may have another value.
        output["cpus_per_worker"] = settings.cpus_per_worker
        return output | {"model": context.storage.upload_verified(local, f"{context.out}/{MODEL_FILE}")}


def check_initial_model(config: PipelineConfig) -> None:
    """Looks for the registered model that has the initial weights, before anything is started.

    Raises:
        ValueError: if there is no such model, or no weights that can be trained further.
    """
    if config.train.initial_model:
        from pipeline.registry.fetch import check_file  # it loads MLflow, which takes a second
        from pipeline.registry.versions import RETRAIN_FILE

        check_file(config.train.initial_model, config.tracking_uri, RETRAIN_FILE)


def _initial_model(context: Context) -> str:
    """Copies the registered model that has the initial weights to where all workers find it; its storage path."""
    from pipeline.registry.fetch import fetch_file
    from pipeline.registry.versions import RETRAIN_FILE

    uri, path = str(context.config.train.initial_model), f"{context.state}/initial.keras"
    with tempfile.TemporaryDirectory() as folder:
        context.storage.upload(fetch_file(uri, context.config.tracking_uri, RETRAIN_FILE, Path(folder)), path)
    return path


def evaluate(context: Context) -> dict[str, Any]:
    import keras

    import perceiver.model  # noqa: F401  registers its classes with Keras

    with tempfile.TemporaryDirectory() as folder:
        model = keras.saving.load_model(fetch_model(context, folder), compile=False)
    return evaluate_model(context, model)


def evaluate_model(context: Context, model: Any) -> dict[str, Any]:
    """Evaluates a Keras model, writes the results, and returns their figures with the paths of the rest."""
    import io
    import json

    import numpy as np

    from pipeline.data.split import open_split
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.evaluation.predictions import write_predictions

    manifest, storage, out = context.inputs["preprocess"], context.storage, context.out
    window_mb = context.config.train.shuffle_window_mb
    test, validation = (open_split(manifest, split, storage, window_mb) for split in ("test", "validation"))
    names = manifest["label_names"], manifest["coarse_label_names"], manifest.get("coarse_of_class")
    found = evaluate(model, test, validation, context.config.evaluation, *names)
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
        "evaluation": storage.write_verified(f"{out}/{EVALUATION_FILE}", json.dumps(results).encode()),
        "pictures": storage.write_verified(f"{out}/pictures.npz", pictures.getvalue()),
    }


def register(context: Context) -> dict[str, Any]:
    from pipeline.data.shards import read_rows
    from pipeline.data.sources import source_of
    from pipeline.evaluation.predictions import read_predictions
    from pipeline.registry.register_trained import Destination, TrainedModel, register_trained

    config = context.config
    data, trained, scores = (context.inputs[name] for name in ("preprocess", "train", "evaluate"))
    model, settings = trained_configs(config, data, context.inputs["search"])
    test = read_predictions(scores["predictions"]["test"], context.storage)
    destination = Destination(
        tracking_uri=config.tracking_uri,
        experiment=config.tracking.experiment,
        artifact_location=config.artifact_location,
        model_name=config.tracking.model_name,
        alias=config.tracking.alias,
    )
    example = read_rows(data["splits"]["test"]["shards"][0], context.storage)  # one shard: a few images will do
    with tempfile.TemporaryDirectory() as folder:
        made = TrainedModel(
            path=fetch_model(context, folder),
            input_example=example.images[:INPUT_EXAMPLE_ROWS],
            row_ids=test.row_ids,
            hits=test.logits.argmax(axis=1) == test.labels,
            source=config.data.source,
            source_description=source_of(config.data).description,
            model=model,
            train=asdict(settings),
            data=data,
            trained=trained,
            scores=scores,
        )
        output = register_trained(made, destination, config.promotion, context.run_identity)
    # These settings are in no key, so a later command with others takes the decision as it is, and says so.
    return output | {"promotion": asdict(config.promotion)}


def report(context: Context) -> dict[str, Any]:
    import io
    import json

    import numpy as np

    from perceiver import cost
    from pipeline.report.render import ReportInputs, render

    config, storage, inputs = context.config, context.storage, context.inputs
    model, training = trained_configs(config, inputs["preprocess"], inputs["search"])
    with np.load(io.BytesIO(storage.read_verified(inputs["evaluate"]["pictures"]))) as pictures:
        report_inputs = ReportInputs(
            title=f"Perceiver on {config.data.source}",
            outputs=inputs,
            seconds={name: manifest["seconds"] for name, manifest in context.manifests.items()},
            settings=flatten(replace(config, model=model, train=training)),
            results=json.loads(storage.read_verified(inputs["evaluate"]["evaluation"])),
            pictures=dict(pictures),
            parameters=cost.parameter_count(model),
            macs_per_image=cost.macs_per_image(model),
            workers=inputs["train"]["num_workers"],
            # Trainings of earlier versions do not say it.
            cpus_per_worker=inputs["train"].get("cpus_per_worker", training.cpus_per_worker),
            gpus_per_worker=inputs["train"].get("gpus_per_worker", 0),
            run_id=inputs["register"]["run_id"],
        )
    return {"report": storage.write_verified(f"{context.out}/{REPORT_FILE}", render(report_inputs).encode())}


def fetch_model(context: Context, folder: str) -> str:
    """Path of a local copy of the trained model, below `folder`.

    Raises:
        CorruptFileError: if its bytes are not those that were trained.
    """
    local = Path(folder) / MODEL_FILE
    context.storage.download_verified(context.inputs["train"]["model"], local)
    return str(local)
