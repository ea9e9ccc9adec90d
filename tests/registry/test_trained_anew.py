"""A run that was trained anew has other weights: what was registered of it before is neither taken nor changed."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.models import Model
from registered_shapes import open_tracker, register_shapes

from perceiver import presets
from pipeline.registry import register_trained
from pipeline.registry.config import PromotionConfig
from pipeline.registry.tags import MODEL_DIGEST
from pipeline.tracking.tracker import Tracker

FIRST, SECOND = "1" * 64, "2" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Tracker:
    return open_tracker(folder)


@pytest.fixture
def name() -> str:
    """Name of a registered model that no other test uses."""
    return uuid.uuid4().hex


def registered_hits(tracker: Tracker, name: str, version: str) -> int:
    """What `register_shapes` has written into the files of a version."""
    source = str(tracker.client.get_model_version(name, version).source)
    return (Model.load(source).metadata or {})["hits"]


@pytest.mark.parametrize("is_deleted", [True, False], ids=["version deleted", "version there"])
def test_other_weights_become_a_version_of_their_own(tracker: Tracker, name: str, is_deleted: bool) -> None:
    first = register_shapes(tracker, name, "run", 700, trained=FIRST)
    assert register_shapes(tracker, name, "run", 700, trained=FIRST) == first
    if is_deleted:
        tracker.client.delete_model_version(name, first["version"])
    second = register_shapes(tracker, name, "run", 900, trained=SECOND)
    assert registered_hits(tracker, name, second["version"]) == 900
    assert second["model_id"] != first["model_id"]
    for tagged in (
        tracker.client.get_model_version(name, second["version"]),
        tracker.client.get_logged_model(second["model_id"]),
    ):
        assert tagged.tags[MODEL_DIGEST] == SECOND
    assert register_shapes(tracker, name, "run", 900, trained=SECOND) == second
    if not is_deleted:
        assert (first["version"], second["version"], second["alias"]) == ("1", "2", "champion")
        assert register_shapes(tracker, name, "run", 700, trained=FIRST)["version"] == "1"


@pytest.mark.parametrize("moment", ["log_model_artifacts", "create_model_version", "set_model_version_tag"])
def test_a_registration_that_was_cut_off_goes_on(
    tracker: Tracker, name: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register_shapes(tracker, name, "run", 700, trained=FIRST)
    tracker.client.delete_model_version(name, first["version"])
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, moment, lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            register_shapes(tracker, name, "run", 900, trained=SECOND)
    second = register_shapes(tracker, name, "run", 900, trained=SECOND)
    assert registered_hits(tracker, name, second["version"]) == 900
    models = tracker.client.search_logged_models([tracker.experiment_id], f"name = '{name}'")
    assert {model.model_id for model in models} == {first["model_id"], second["model_id"]}
    (version,) = tracker.client.search_model_versions(f"name = '{name}'")
    assert str(version.version) == second["version"]


def test_what_an_earlier_version_of_this_project_registered_is_taken_as_it_is(tracker: Tracker, name: str) -> None:
    first = register_shapes(tracker, name, "run", 700)
    assert register_shapes(tracker, name, "run", 700, trained=SECOND) == first


def test_the_pipeline_says_which_file_was_trained(
    tracker: Tracker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: dict[str, Any] = {}
    monkeypatch.setattr(register_trained, "register", lambda *_, **named: registered.update(named) or {})
    tracker.find_or_create_run("pipeline", "said")
    made = register_trained.TrainedModel(
        path="model.keras",
        input_example=np.zeros((1, 8, 8, 1), np.uint8),
        row_ids=np.arange(2),
        hits=np.ones(2, bool),
        source="shapes",
        source_description="Shapes.",
        model=presets.quickstart(),
        train={},
        data={"digest": "d" * 64, "splits": {"test": {"rows": 2}}, "label_names": ["circle", "square"]},
        trained={"epochs": 1, "num_workers": 1, "images_per_second": 1.0, "model": {"path": "m", "sha256": FIRST}},
        scores={
            "top1": 1.0,
            "top5": 1.0,
            "loss": 0.1,
            "test_digest": "e" * 64,
            "calibration": {"temperature": 1.0, "ece_calibrated": 0.02, "loss_calibrated": 0.1},
            "latency": {"batch_1_median_ms": 5.0, "device": "none"},
        },
    )
    destination = register_trained.Destination(tracker.uri, "shapes", f"{folder}/mlartifacts", "shapes", "champion")
    register_trained.register_trained(made, destination, PromotionConfig(), "said")
    assert registered["digest"] == FIRST
