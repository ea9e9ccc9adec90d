"""From what the tasks of a run have found to a version of the registered model: what it is judged by, and its card."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import ModelConfig, PipelineConfig, TrainingConfig
from pipeline.export import export
from pipeline.model_card import Card
from pipeline.predictions import Predictions
from pipeline.registry import Evidence, register
from pipeline.run_description import describe
from pipeline.tracking import Tracker, patiently

# How long a tracking server may be away before the task fails; by then there is nothing else to do.
PATIENCE_SECONDS = 180.0
CARD_FACTS = ("mlflow.source.git.commit", "mlflow.source.git.dirty", "version.keras", "version.tensorflow", "cpu")


@dataclass(frozen=True)
class TrainedModel:
    """A model and what is known of it.

    Attributes:
        path: local `.keras` file.
        input_example: uint8 images (n, H, W, C).
        test: its predictions for the test rows.
        model, train: the settings, with what the data and the search have decided.
        data, trained, scores: outputs of the tasks `preprocess`, `train` and `evaluate`.
    """

    path: str
    input_example: np.ndarray
    test: Predictions
    model: ModelConfig
    train: TrainingConfig
    data: dict[str, Any]
    trained: dict[str, Any]
    scores: dict[str, Any]


def register_trained(made: TrainedModel, config: PipelineConfig, run_identity: str) -> dict[str, Any]:
    """Registers the model as an output of the run, once, and decides whether it becomes the champion.

    Returns:
        What `registry.register` returns, with `run_id`, `tracking_uri` and `experiment`.

    Raises:
        TrackingUnavailable: if the tracking store has not answered for `PATIENCE_SECONDS`.
    """
    return patiently(lambda: _register(made, config, run_identity), config.tracking_uri, PATIENCE_SECONDS)


def _register(made: TrainedModel, config: PipelineConfig, run_identity: str) -> dict[str, Any]:
    tracker = Tracker(config.tracking_uri, config.tracking.experiment, config.artifact_location)
    run_id = tracker.run(run_identity)
    scores, calibration = made.scores, made.scores["calibration"]
    card = model_card(made, config, run_id)
    registered = register(
        tracker,
        name=config.tracking.model_name,
        identity=f"{run_identity}/register",
        run_id=run_id,
        export=functools.partial(
            export,
            made.path,
            temperature=calibration["temperature"],
            input_example=made.input_example,
            label_names=made.data["label_names"],
            metadata={"data_sha256": made.data["digest"], "temperature": calibration["temperature"]},
            card=card.markdown(),
        ),
        evidence=Evidence(
            test_digest=scores["test_digest"],
            row_ids=made.test.row_ids,
            hits=made.test.logits.argmax(axis=1) == made.test.labels,
            calibration_error=calibration["ece_calibrated"],
            latency_ms=scores["latency"]["batch_1_median_ms"],
        ),
        label_names=made.data["label_names"],
        promotion=config.promotion,
        champion=config.tracking.alias,
        tags={
            "dataset.sha256": made.data["digest"],
            "test.top1": f"{scores['top1']:.6f}",
            "test.top5": f"{scores['top5']:.6f}",
            "temperature": f"{calibration['temperature']:.6f}",
        },
        description=card.summary(),
    )
    place = {"tracking_uri": config.tracking_uri, "experiment": config.tracking.experiment}
    return registered | {"run_id": run_id} | place


def model_card(made: TrainedModel, config: PipelineConfig, run_id: str) -> Card:
    scores, calibration, described = made.scores, made.scores["calibration"], describe().tags
    return Card(
        name=config.tracking.model_name,
        source=config.data.source,
        digest=made.data["digest"],
        test_digest=scores["test_digest"],
        rows={name: split["rows"] for name, split in made.data["splits"].items()},
        label_names=made.data["label_names"],
        scores={
            **{name: scores[name] for name in ("top1", "top5", "loss")},
            "calibration_error": calibration["ece_calibrated"],
            "calibrated_loss": calibration["loss_calibrated"],
        },
        temperature=calibration["temperature"],
        latency_ms=scores["latency"]["batch_1_median_ms"],
        device=scores["latency"]["device"],
        model=made.model,
        train=made.train,
        epochs=made.trained["epochs"],
        num_workers=made.trained["num_workers"],
        images_per_second=made.trained["images_per_second"],
        about={name: described[name] for name in CARD_FACTS if name in described} | {"MLflow run": run_id},
    )
