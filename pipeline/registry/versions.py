"""Versions of the registered model in the MLflow registry, and the alias of the best one, the champion.

Every version carries its evidence: tags, and the file `evaluation/test_rows.npz` among its files. Pipelines that
register at the same time agree on the champion without a lock, which a tracking server does not have:

1. The call that creates a version also stores the first version that it is compared with (`promotion.since`) and the
   champion at that time (`promotion.incumbent`).
2. Each pipeline decides among all versions since that one, sets the alias, and looks again, until nothing changes.

A pipeline that sets the alias from an outdated view therefore sees the change afterwards, and corrects the alias. A
version that is undecided for long was abandoned: the next pipeline decides it too, from the present champion on.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

from pipeline.registry.config import PromotionConfig
from pipeline.registry.evidence import ROWS_FILE, TEST_DIGEST, NoEvidence, read_evidence, tags_of, write_rows
from pipeline.registry.promotion import Candidate, Evidence, decide
from pipeline.registry.tags import ALIAS, EVIDENCE, INCUMBENT, MODEL_DIGEST, REASON, SINCE, STATE, names_tag
from pipeline.tracking.artifacts import TRANSFER_SECONDS, download, list_files, within
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.tracker import IDENTITY_TAG, Tracker

CHALLENGER = "challenger"
# Files of a version in addition to those that MLflow writes and to `ROWS_FILE`.
RETRAIN_FILE, CARD_FILE = "retrain/model.keras", "README.md"
OPEN = "open"  # state of a version that is not decided yet
ABANDONED_SECONDS = 3600.0
"""Age from which the pipeline of an undecided version counts as killed; if it goes on, it takes what was decided."""
# Each turn but the last follows a change by another pipeline, and so many do not register at once.
MAX_TURNS = 50


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
    digest: str | None = None,
    champion: str = "champion",
    tags: Mapping[str, str] | None = None,
    description: str = "",
) -> dict[str, str]:
    """Registers a model as a version of `name`, and decides whether it becomes the champion.

    Args:
        name: Name of the registered model, which is created if it does not exist.
        identity: Unique id of the version; a call with the same identity and digest continues an earlier one.
        run_id: The run whose output the model is.
        export: Writes the files of the model into an empty folder; its second argument is MLflow's metadata.
        label_names: Names of the classes, in order.
        digest: SHA-256 of the file that was trained, if it is known. Another file than before gets its own version.
        champion: Alias of the best version.
        tags: Further tags of the version.
        description: Description of the version.

    Returns:
        `name`, `version`, the `alias` that the version got (`champion` or `challenger`), `champion` (the name of that
        alias), `uri` (`models:/<name>/<version>`), `model_id` and the `reason` of the decision.
    """
    registry = _Registry(tracker, name, champion)
    identity = registry.identity_of(identity, digest)
    known = {} if digest is None else {MODEL_DIGEST: digest}
    model = registry.find_or_create_model(identity, run_id, known)
    # The files of a model that was registered before may be gone since.
    if model.status != LoggedModelStatus.READY or not has_file(model.artifact_location, "MLmodel", tracker.uri):
        registry.upload(model, run_id, export, evidence)
    version = registry.find_or_create_version(
        model,
        identity,
        run_id,
        {**(tags or {}), **tags_of(evidence), **known, "label_names": names_tag(label_names)},
        description,
    )
    alias, reason = registry.settle(version, promotion)
    return {
        "name": name,
        "version": str(version.version),
        "alias": alias,
        "champion": champion,
        "uri": f"models:/{name}/{version.version}",
        "model_id": model.model_id,
        "reason": reason,
    }


class _Registry:
    """One registered model. Each method can be repeated after a crash."""

    def __init__(self, tracker: Tracker, name: str, champion: str) -> None:
        self._tracker, self._client = tracker, tracker.client
        self._name, self._champion = name, champion
        try:
            self._client.create_registered_model(name)
        except TrackingError as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def identity_of(self, identity: str, digest: str | None) -> str:
        """`identity`, or one for the digest alone if a model with another digest was registered under it.

        What has no digest was registered by an earlier version of this project, and is taken as it is.
        """
        found = (self._find_model(identity), self._find_version(identity))
        digests = {each.tags[MODEL_DIGEST] for each in found if each is not None and MODEL_DIGEST in each.tags}
        return f"{identity}/{digest[:12]}" if digest is not None and digests - {digest} else identity

    def find_or_create_model(self, identity: str, run_id: str, tags: Mapping[str, str]) -> LoggedModel:
        """The one logged model with this identity, an output of the run; `tags` are those of a new one.

        It is PENDING until its files are complete.
        """
        client, tracker = self._client, self._tracker
        with tracker.exclusive():
            model = self._find_model(identity)
            if model is None:
                tags = {**tags, IDENTITY_TAG: identity}
                model = client.create_logged_model(tracker.experiment_id, self._name, source_run_id=run_id, tags=tags)
        outputs = client.get_run(run_id).outputs
        if not any(output.model_id == model.model_id for output in (outputs.model_outputs if outputs else [])):
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model

    def _find_model(self, identity: str) -> LoggedModel | None:
        condition = f"tags.`{IDENTITY_TAG}` = '{identity}'"
        return next(iter(self._client.search_logged_models([self._tracker.experiment_id], condition)), None)

    def upload(
        self, model: LoggedModel, run_id: str, export: Callable[[Path, Model], None], evidence: Evidence
    ) -> None:
        """Writes and uploads the files of the model, which is READY afterwards."""
        with TemporaryDirectory() as local:
            folder = Path(local)
            metadata = Model(
                artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
            )
            export(folder, metadata)
            write_rows(evidence, folder)
            upload = functools.partial(self._client.log_model_artifacts, model.model_id, local)
            within(TRANSFER_SECONDS, upload, f"the artifact store {model.artifact_location}")
        self._client.finalize_logged_model(model.model_id, "READY")

    def find_or_create_version(
        self, model: LoggedModel, identity: str, run_id: str, tags: Mapping[str, str], description: str
    ) -> ModelVersion:
        """The one version with this identity; `tags` and `description` are those of a new one."""
        with self._tracker.exclusive():
            version = self._find_version(identity)
            if version is None:
                version = self._create_version(model, run_id, {**tags, IDENTITY_TAG: identity}, description)
        versions = json.dumps([{"name": self._name, "version": version.version}])
        self._client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": versions})
        return version

    def _find_version(self, identity: str) -> ModelVersion | None:
        found = self._client.search_model_versions(f"name = '{self._name}' and tags.`{IDENTITY_TAG}` = '{identity}'")
        return min(found, key=lambda version: int(version.version)) if found else None

    def _create_version(
        self, model: LoggedModel, run_id: str, tags: Mapping[str, str], description: str
    ) -> ModelVersion:
        """Creates the version together with all its tags, so that no version exists without them."""
        versions = self._versions()
        undecided = {key: v for key, v in versions.items() if v.tags.get(STATE) == OPEN and not _is_abandoned(v)}
        since = min(undecided, default=max(versions, default=0) + 1)
        # While others are undecided, one of them may hold the alias temporarily.
        incumbent = undecided[since].tags[INCUMBENT] if undecided else str(self._holder(self._champion))
        return self._client.create_model_version(
            self._name,
            # Not `models:/<model_id>`: an SQL store looks that up in the global tracking URI.
            source=model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            tags={**tags, STATE: OPEN, SINCE: str(since), INCUMBENT: incumbent},
            description=description,
        )

    def settle(self, version: ModelVersion, config: PromotionConfig) -> tuple[str, str]:
        """Sets the alias by the rules; returns the alias that the version got, and the reason.

        Versions that were abandoned are decided too. A version that was decided for another alias is decided
        anew, or a ValueError if its evidence is gone since.
        """
        client, name, number = self._client, self._name, int(version.version)
        tags = client.get_model_version(name, version.version).tags
        if tags[STATE] == self._champion or (tags[STATE] == CHALLENGER and tags.get(ALIAS) in (None, self._champion)):
            return tags[STATE], tags[REASON]
        if tags[STATE] == OPEN:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        since = int(tags[SINCE])
        candidates: dict[int, Candidate | None] = {}
        reasons: dict[int, str] = {}
        for _ in range(MAX_TURNS):
            holder = self._holder(self._champion)
            versions = self._versions()
            # A holder from before `since` was the champion before, or a person has set the alias.
            base = holder if holder is not None and holder < since else _number(tags[INCUMBENT])
            abandoned = {key for key, each in versions.items() if _is_abandoned(each)} - {number}
            wanted = {key for key in versions if key >= since} | abandoned | ({base} if base in versions else set())
            for key in wanted - candidates.keys():
                candidates[key] = self._candidate(versions[key])
            if candidates[number] is None:
                raise ValueError(f"version {number} of {name} has lost {ROWS_FILE}: set {self._champion!r} by hand")
            contenders = [c for key in wanted - {base} if (c := candidates[key]) is not None]
            incumbent = (candidates[base] or base) if base in versions else None
            decision = decide(incumbent, contenders, config)
            winner = decision.champion
            reasons |= decision.reasons
            if winner == holder:
                break
            client.set_registered_model_alias(name, self._champion, str(winner))
            # It was decided before other versions were seen. What was said of the incumbent stays.
            if versions[winner].tags.get(STATE) == CHALLENGER and winner in decision.reasons:
                self._close(winner, self._champion, reasons[winner])
        state = self._champion if winner == number else CHALLENGER
        if state == CHALLENGER:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        elif self._holder(CHALLENGER) == number:
            client.delete_registered_model_alias(name, CHALLENGER)
        self._close(number, state, reasons[number])
        for key in abandoned:
            # What was compared with the others and has no reason is the incumbent: its pipeline had set the alias.
            held = key == winner or (key not in reasons and candidates[key] is not None)
            default = "it had the alias before" if held else f"{ROWS_FILE} is gone"
            self._close(key, self._champion if held else CHALLENGER, reasons.get(key, default))
        return state, reasons[number]

    def _candidate(self, version: ModelVersion) -> Candidate | None:
        """A version with its evidence; one whose evidence is gone has none, and gets a tag that says so."""
        try:
            return _read_candidate(version, self._tracker.uri)
        except NoEvidence as error:
            self._client.set_model_version_tag(self._name, version.version, EVIDENCE, str(error))
            return None

    def _close(self, version: int, state: str, reason: str) -> None:
        """Stores the decision. The state is set last: from then on the version counts as decided, for this alias."""
        self._client.set_model_version_tag(self._name, str(version), ALIAS, self._champion)
        self._client.set_model_version_tag(self._name, str(version), REASON, reason)
        self._client.set_model_version_tag(self._name, str(version), STATE, state)

    def _versions(self) -> dict[int, ModelVersion]:
        return {int(v.version): v for v in self._client.search_model_versions(f"name = '{self._name}'")}

    def _holder(self, alias: str) -> int | None:
        """Number of the version that has the alias; None if no version has it."""
        return _number(self._client.get_registered_model(self._name).aliases.get(alias))


def has_file(artifacts: str, file: str, tracking_uri: str) -> bool:
    """Whether there is the file `file` in the artifacts at the URI `artifacts`.

    Raises:
        TimeoutError: if their store does not answer.
    """
    folder, _, name = f"{artifacts}/{file}".rpartition("/")
    return any(path.rpartition("/")[2] == name for path in list_files(folder, tracking_uri))


def _is_abandoned(version: ModelVersion) -> bool:
    age = time.time() - version.creation_timestamp / 1000
    return version.tags.get(STATE) == OPEN and age > ABANDONED_SECONDS


def _read_candidate(version: ModelVersion, tracking_uri: str) -> Candidate | None:
    """A version with its evidence; None if it has none, because it was not registered by this module.

    Raises:
        NoEvidence: If it had some, and its file is gone or damaged.
    """
    if TEST_DIGEST not in version.tags or SINCE not in version.tags:
        return None
    if not has_file(str(version.source), ROWS_FILE, tracking_uri):
        raise NoEvidence(f"{ROWS_FILE} is gone")
    with TemporaryDirectory() as folder:
        path = download(f"{version.source}/{ROWS_FILE}", tracking_uri, folder)
        return Candidate(int(version.version), read_evidence(version.tags, path))


def _number(version: str | int | None) -> int | None:
    return None if version in (None, "None") else int(version)
