"""Registers the model that a run has trained: as an MLflow model, with its evidence and its card."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from perceiver.config import PerceiverConfig
from pipeline.masking import mask
from pipeline.registry.config import PromotionConfig
from pipeline.registry.export import export
from pipeline.registry.model_card import ModelCard
from pipeline.registry.promotion import Evidence
from pipeline.registry.versions import register
from pipeline.tracking.artifacts import write_probe
from pipeline.tracking.errors import retry_transient
from pipeline.tracking.provenance import collect_provenance
from pipeline.tracking.tracker import Tracker

# How long a tracking server may be away before the task fails; nothing else is left to do meanwhile.
PATIENCE_SECONDS = 180.0
CARD_FACTS = ("mlflow.source.git.commit", "mlflow.source.git.dirty", "version.keras", "version.tensorflow", "cpu")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what the tasks of the run have found out about it.

    Attributes:
        path: Local `.keras` file: uint8 images to logits.
        input_example: Images, uint8 (n, H, W, C).
        row_ids: Ids of the test rows, int64 (N,), ascending.
        hits: Whether the model predicts the class of each test row correctly, bool (N,).
        source: Name of the data set.
        source_description: What the data set is, by whom, and its terms.
        model: Settings of the model, including those that the data and the search have determined.
        train: Settings of the training, by name.
        data, trained, scores: Outputs of the tasks `preprocess`, `train` and `evaluate`.
    """

    path: str
    input_example: np.ndarray
    row_ids: np.ndarray
    hits: np.ndarray
    source: str
    source_description: str
    model: PerceiverConfig
    train: Mapping[str, Any]
    data: Mapping[str, Any]
    trained: Mapping[str, Any]
    scores: Mapping[str, Any]


@dataclass(frozen=True)
class Destination:
    """Where a model is registered.

    Attributes:
        tracking_uri: Tracking and registry URI of MLflow.
        experiment: Experiment of the run and of the logged model.
        artifact_location: Where a new experiment keeps its artifacts; None leaves it to the server.
        model_name: Name of the registered model.
        alias: Alias of the best version.
    """

    tracking_uri: str
    experiment: str
    artifact_location: str | None
    model_name: str
    alias: str


def register_trained(
    trained: TrainedModel, destination: Destination, promotion: PromotionConfig, run_identity: str
) -> dict[str, Any]:
    """Registers the model as an output of the run and decides whether it becomes the champion. Safe to repeat.

    Args:
        run_identity: Unique id of the run; the same when the run is restarted.

    Returns:
        The result of `versions.register`, with `run_id`, `tracking_uri` without its login and `experiment`.

    Raises:
        TrackingUnavailable: If the tracking store has not answered for `PATIENCE_SECONDS`.
    """
    return retry_transient(
        lambda: _register(trained, destination, promotion, run_identity), destination.tracking_uri, PATIENCE_SECONDS
    )


def _register(
    trained: TrainedModel, destination: Destination, promotion: PromotionConfig, run_identity: str
) -> dict[str, Any]:
    tracker = Tracker(destination.tracking_uri, destination.experiment, destination.artifact_location)
    run_id = tracker.existing_run(run_identity)
    write_probe(tracker)  # a store that is gone is found out in seconds, and tried again
    data, scores, calibration = trained.data, trained.scores, trained.scores["calibration"]
    card = _model_card(trained, destination, run_id)
    registered = register(
        tracker,
        name=destination.model_name,
        identity=f"{run_identity}/register",
        run_id=run_id,
        export=functools.partial(
            export,
            trained.path,
            temperature=calibration["temperature"],
            input_example=trained.input_example,
            label_names=data["label_names"],
            metadata={"data_sha256": data["digest"], "temperature": calibration["temperature"]}
            | ({"decoding": data["decoding"]} if "decoding" in data else {}),
            card=card.markdown(),
        ),
        evidence=Evidence(
            test_digest=scores["test_digest"],
            row_ids=trained.row_ids,
            hits=trained.hits,
            calibration_error=calibration["ece_calibrated"],
            latency_ms=scores["latency"]["batch_1_median_ms"],
        ),
        label_names=data["label_names"],
        promotion=promotion,
        digest=trained.trained["model"]["sha256"],
        champion=destination.alias,
        tags={
            "dataset.sha256": data["digest"],
            "test.top1": f"{scores['top1']:.6f}",
            "test.top5": f"{scores['top5']:.6f}",
            "temperature": f"{calibration['temperature']:.6f}",
        },
        description=card.summary(),
    )
    place = {"tracking_uri": mask(destination.tracking_uri), "experiment": destination.experiment}
    return registered | {"run_id": run_id} | place


def _model_card(trained: TrainedModel, destination: Destination, run_id: str) -> ModelCard:
    data, scores, calibration = trained.data, trained.scores, trained.scores["calibration"]
    facts = collect_provenance().tags
    return ModelCard(
        name=destination.model_name,
        alias=destination.alias,
        source=trained.source,
        description=trained.source_description,
        digest=data["digest"],
        test_digest=scores["test_digest"],
        rows={split: described["rows"] for split, described in data["splits"].items()},
        label_names=data["label_names"],
        scores={
            # Evaluations of earlier versions have no balanced accuracy.
            **{metric: scores[metric] for metric in ("top1", "top5", "balanced_accuracy", "loss") if metric in scores},
            "calibration_error": calibration["ece_calibrated"],
            "calibrated_loss": calibration["loss_calibrated"],
        },
        temperature=calibration["temperature"],
        latency_ms=scores["latency"]["batch_1_median_ms"],
        device=scores["latency"]["device"],
        model=trained.model,
        train=trained.train,
        epochs=trained.trained["epochs"],
        num_workers=trained.trained["num_workers"],
        images_per_second=trained.trained["images_per_second"],
        provenance={fact: facts[fact] for fact in CARD_FACTS if fact in facts} | {"MLflow run": run_id},
    )
