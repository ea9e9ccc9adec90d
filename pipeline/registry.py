"""The registered model: its versions, made once each, and which of them is the champion.

Every version carries what it is judged by: tags, and the file `evaluation/test_rows.npz` among its files. Pipelines
that register at the same time agree without a lock, which a tracking server does not have:

1. A version says in the call that makes it from which version on it looks at others (`promotion.since`) and who was
   champion then (`promotion.incumbent`).
2. Each pipeline decides among all versions since that one, sets the alias, and looks again, until nothing has changed.

Who sets the alias with an old view sees that afterwards, and sets it right.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow.artifacts
import numpy as np
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

from pipeline.promotion import Candidate, PromotionConfig, decide
from pipeline.tracking import IDENTITY_TAG, Tracker

CHALLENGER = "challenger"
# Among the files of a version, beside those that MLflow knows.
ROWS_FILE, RETRAIN_FILE, CARD_FILE = "evaluation/test_rows.npz", "retrain/model.keras", "README.md"
STATE, REASON, SINCE, INCUMBENT = (f"promotion.{name}" for name in ("state", "reason", "since", "incumbent"))
TEST_DIGEST, CALIBRATION_ERROR, LATENCY = "test.sha256", "test.calibration_error", "latency_ms"
OPEN = "open"
# Each turn but the last follows another pipeline's; there are not that many at once.
MOST_TURNS = 50


@dataclass(frozen=True)
class Evidence:
    """What a new version is judged by; see `promotion.Candidate`."""

    test_digest: str
    row_ids: np.ndarray
    hits: np.ndarray
    calibration_error: float
    latency_ms: float


def register(
    tracker: Tracker,
    *,
    name: str,
    identity: str,
    run_id: str,
    export: Callable[[Path, Model], None],
    evidence: Evidence,
    label_names: Sequence[str],
    promotion: PromotionConfig,
    champion: str = "champion",
    tags: Mapping[str, str] | None = None,
    description: str = "",
) -> dict[str, str]:
    """Registers a model as a version of `name`, once for an identity, and decides whether it becomes the champion.

    Args:
        run_id: the run whose output it is.
        export: writes the files of the model into an empty folder; is given what MLflow knows of the model.
        label_names: names of the classes in order.
        champion: the alias of the best version.

    Returns:
        `name`, `version`, the `alias` that it got (`champion`, or `challenger`), `champion` (the name of that alias),
        `uri` (`models:/<name>/<version>`), `model_id` and the `reason` of the decision.
    """
    client = tracker.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model = _logged_model(tracker, identity, name, run_id)
    if model.status != LoggedModelStatus.READY:
        with TemporaryDirectory() as local:
            folder = Path(local)
            known = Model(
                artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
            )
            export(folder, known)
            (folder / ROWS_FILE).parent.mkdir()
            np.savez_compressed(folder / ROWS_FILE, row_ids=evidence.row_ids, hits=evidence.hits)
            client.log_model_artifacts(model.model_id, local)
        client.finalize_logged_model(model.model_id, "READY")
    with tracker.exclusive():
        version = _find_version(client, name, identity)
        if version is None:
            version = _create_version(
                client, name, model, run_id, champion, description, _tags(evidence, label_names, identity, tags or {})
            )
    client.set_logged_model_tags(
        model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version.version}])}
    )
    state, reason = _settle(tracker, name, version, champion, promotion)
    return {
        "name": name,
        "version": str(version.version),
        "alias": state,
        "champion": champion,
        "uri": f"models:/{name}/{version.version}",
        "model_id": model.model_id,
        "reason": reason,
    }


def _logged_model(tracker: Tracker, identity: str, name: str, run_id: str) -> LoggedModel:
    """The one logged model with this identity, as an output of the run; PENDING until its files are complete."""
    client = tracker.client
    with tracker.exclusive():
        models = client.search_logged_models([tracker.experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'")
        if models:
            model = models[0]
        else:
            tags = {IDENTITY_TAG: identity}
            model = client.create_logged_model(tracker.experiment_id, name, source_run_id=run_id, tags=tags)
    outputs = client.get_run(run_id).outputs
    if not any(output.model_id == model.model_id for output in (outputs.model_outputs if outputs else [])):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def _tags(evidence: Evidence, label_names: Sequence[str], identity: str, tags: Mapping[str, str]) -> dict[str, str]:
    return {
        **tags,
        IDENTITY_TAG: identity,
        "label_names": json.dumps(list(label_names)),
        TEST_DIGEST: evidence.test_digest,
        CALIBRATION_ERROR: repr(float(evidence.calibration_error)),
        LATENCY: repr(float(evidence.latency_ms)),
        STATE: OPEN,
    }


def _find_version(client: MlflowClient, name: str, identity: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY_TAG}` = '{identity}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def _create_version(
    client: MlflowClient,
    name: str,
    model: LoggedModel,
    run_id: str,
    champion: str,
    description: str,
    tags: dict[str, str],
) -> ModelVersion:
    """A version with all its tags, which go into the call that creates it, so that none exists without."""
    versions = client.search_model_versions(f"name = '{name}'")
    numbers = [int(version.version) for version in versions]
    undecided = {int(version.version): version for version in versions if version.tags.get(STATE) == OPEN}
    since = min(undecided, default=max(numbers, default=0) + 1)
    # While others are being decided upon, one of them may hold the alias for a moment.
    incumbent = undecided[since].tags[INCUMBENT] if undecided else str(_holder(client, name, champion))
    return client.create_model_version(
        name,
        # Not `models:/<model_id>`: an SQL store looks that up in the global tracking URI.
        source=model.artifact_location,
        run_id=run_id,
        model_id=model.model_id,
        tags={**tags, SINCE: str(since), INCUMBENT: incumbent},
        description=description,
    )


def _settle(
    tracker: Tracker, name: str, version: ModelVersion, champion: str, config: PromotionConfig
) -> tuple[str, str]:
    """Sets the alias as the rules want it; returns which alias the version got, and why."""
    client, number = tracker.client, int(version.version)
    tags = client.get_model_version(name, version.version).tags
    if tags[STATE] != OPEN:
        return tags[STATE], tags[REASON]
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    since = int(tags[SINCE])
    candidates: dict[int, Candidate | None] = {}
    for _ in range(MOST_TURNS):
        holder = _holder(client, name, champion)
        contest = {int(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
        # Who holds the alias and is no part of this contest was put there before it, or by a person.
        base = holder if holder is not None and holder < since else _number(tags[INCUMBENT])
        wanted = {key for key in contest if key >= since} | ({base} if base in contest else set())
        for key in wanted - candidates.keys():
            candidates[key] = _candidate(tracker, contest[key])
        contenders = [c for key in wanted - {base} if (c := candidates[key]) is not None]
        incumbent = (candidates[base] or base) if base in contest else None
        decision = decide(incumbent, contenders, config)
        if decision.champion == holder:
            break
        client.set_registered_model_alias(name, champion, str(decision.champion))
        if contest[decision.champion].tags.get(STATE) == CHALLENGER:  # decided before others of this contest were seen
            _record(client, name, decision.champion, champion, decision.reasons[decision.champion])
    state = champion if decision.champion == number else CHALLENGER
    if state == CHALLENGER:
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    elif _holder(client, name, CHALLENGER) == number:
        client.delete_registered_model_alias(name, CHALLENGER)
    _record(client, name, number, state, decision.reasons[number])
    return state, decision.reasons[number]


def _record(client: MlflowClient, name: str, version: int, state: str, reason: str) -> None:
    client.set_model_version_tag(name, str(version), REASON, reason)
    client.set_model_version_tag(name, str(version), STATE, state)  # last: from then on it is decided


def _candidate(tracker: Tracker, version: ModelVersion) -> Candidate | None:
    """What the version is judged by; None if it does not carry that: it was registered in another way."""
    if TEST_DIGEST not in version.tags or SINCE not in version.tags:
        return None
    with TemporaryDirectory() as folder:
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{version.source}/{ROWS_FILE}", dst_path=folder, tracking_uri=tracker.uri
        )
        with np.load(path) as rows:
            return Candidate(
                version=int(version.version),
                test_digest=version.tags[TEST_DIGEST],
                row_ids=rows["row_ids"],
                hits=rows["hits"],
                calibration_error=float(version.tags[CALIBRATION_ERROR]),
                latency_ms=float(version.tags[LATENCY]),
            )


def _holder(client: MlflowClient, name: str, alias: str) -> int | None:
    return _number(client.get_registered_model(name).aliases.get(alias))


def _number(version: str | int | None) -> int | None:
    return None if version in (None, "None") else int(version)
