"""Registered models whose files are minimal: versions that classify so many of 1,000 rows correctly."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from mlflow.models import Model

from pipeline.registry.config import PromotionConfig
from pipeline.registry.promotion import Evidence
from pipeline.registry.versions import register
from pipeline.tracking.tracker import Tracker

PROJECT = Path(__file__).parents[2]
LIMITS = PromotionConfig(max_calibration_error=0.1, max_latency_ms=100.0)
ROWS = 1000


def open_tracker(folder: Path) -> Tracker:
    return Tracker(f"sqlite:///{folder}/mlflow.db", "shapes", f"{folder}/mlartifacts")


def export(folder: Path, known: Model, hits: int) -> None:
    """Writes a model without a flavour, which is enough for the registry."""
    known.metadata = {"hits": hits}
    known.save(str(folder / "MLmodel"))


def register_shapes(
    tracker: Tracker,
    name: str,
    identity: str,
    hits: int = 700,
    *,
    digest: str = "d" * 64,
    error: float = 0.02,
    latency: float = 5,
    label_names: Sequence[str] = ("circle", "square"),
    alias: str = "champion",
    promotion: PromotionConfig = LIMITS,
    trained: str | None = None,
) -> dict[str, str]:
    """Registers a model that classifies the first `hits` of 1,000 rows correctly; `trained` is the digest of its file.

    The description of the model has the hits as its metadata.
    """
    return register(
        tracker,
        name=name,
        identity=f"{name}/{identity}",
        run_id=tracker.find_or_create_run("register", f"{name}/{identity}"),
        export=partial(export, hits=hits),
        evidence=Evidence(digest, np.arange(ROWS), np.arange(ROWS) < hits, error, latency),
        label_names=label_names,
        promotion=promotion,
        digest=trained,
        champion=alias,
        tags={"dataset.sha256": "a" * 64},
        description="Shapes.",
    )


def champion(tracker: Tracker, name: str) -> int:
    return int(tracker.client.get_model_version_by_alias(name, "champion").version)
