"""Runs in MLflow. Calls are idempotent: a repeated call adds no second run, parameter, metric, artifact or data set.

This is the only module that creates an `MlflowClient`, always with an explicit URI. It uses neither MLflow's active run
nor its global tracking URI, so MLFLOW_RUN_ID and similar environment variables have no effect. Calls that a restarted
driver repeats are safe: a run has the tag `pipeline.identity`, and is looked up by it before it is created.
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

from pipeline.tracking.config import STORE_REMEDY, TRACKING_STORES
from pipeline.tracking.errors import TrackingError, TrackingUnavailable, check_login

IDENTITY_TAG = "pipeline.identity"
# MLflow reads these from the environment only, at each call. Values that the user has set take precedence.
ENVIRONMENT = {
    # By default, a call to a server that does not answer is retried for four minutes. Callers here retry themselves.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints two lines for every run that ends
}
# Without it, `mlflow ui` opens the experiment in its view of generative AI.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def open_client(uri: str | None) -> MlflowClient:
    """Client of the tracking store and the model registry at `uri`; its calls fail soon if a server does not answer.

    Raises:
        ValueError: if it is no URI of a store; MLflow would take it for a folder.
    """
    if uri is not None and not TRACKING_STORES.fullmatch(uri):
        raise ValueError(f"tracking.uri = {uri!r}: {STORE_REMEDY}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class Tracker:
    """Runs of one experiment.

    Args:
        uri: Tracking and registry URI, e.g. `sqlite:////runs/mlflow.db` or `http://host:5000`.
        experiment: Name of the experiment, which is created if it does not exist.
        artifact_location: Where a new experiment keeps its artifacts; None leaves it to the server. For an SQLite store
            always give one: MLflow's default is a folder in the working directory.

    Raises:
        ValueError: If the experiment was deleted, or the login is refused.
        TrackingError: If the store does not answer.
    """

    def __init__(self, uri: str, experiment: str, artifact_location: str | None = None) -> None:
        self.uri = uri
        self._lock: Path | None = None
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
            database.parent.mkdir(parents=True, exist_ok=True)
            self._lock = database.with_name(f"{database.name}.lock")
        with self.exclusive():
            self.client = open_client(uri)
            try:
                found = self._find_or_create(experiment, artifact_location)
            except TrackingError as error:
                check_login(error, uri)
                raise
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"tracking.experiment = {experiment!r} was deleted from {uri}; choose another name or run "
                f"`mlflow experiments restore -x {found.experiment_id}`"
            )
        self._tags = {name: found.tags.get(name, value) for name, value in EXPERIMENT_TAGS.items()}
        if not self._tags.keys() <= found.tags.keys():  # it was made elsewhere, or by an earlier version
            self._tag_experiment(found.experiment_id)
        self.experiment_id: str = found.experiment_id
        self.artifact_location: str = found.artifact_location
        self._history: dict[tuple[str, str], dict[int, list[tuple[int, float]]]] = {}

    def check_writing(self) -> None:
        """Checks that runs and models can be recorded in the experiment, of which nothing is changed.

        Raises:
            ValueError: If the login may only read it, or if the server is too old.
            TrackingError: If the store does not answer.
        """
        self._tag_experiment(self.experiment_id)
        try:
            self.client.search_logged_models([self.experiment_id], max_results=1)
        except TrackingError as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            raise ValueError(
                f"tracking.uri = {self.uri}: the server, or a proxy before it, does not know logged models, which came "
                "with MLflow 3: install a newer MLflow there"
            ) from error

    def _tag_experiment(self, experiment_id: str) -> None:
        for name, value in self._tags.items():
            try:
                self.client.set_experiment_tag(experiment_id, name, value)
            except TrackingError as error:
                check_login(error, self.uri)
                raise

    def _find_or_create(self, experiment: str, artifact_location: str | None) -> Experiment:
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            try:
                self.client.create_experiment(experiment, artifact_location, tags=EXPERIMENT_TAGS)
            except TrackingError as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver has just created it
                    raise
            found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        return found

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lets one process at a time into the block if the store is an SQLite file; does nothing for a server.

        It is not reentrant. MLflow creates its tables without a lock, and tags are not unique. The operating system
        releases the lock when its process ends, even if it is killed.
        """
        with open(self._lock, "a") if self._lock else nullcontext() as lock:
            if lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def find_run(self, identity: str) -> str | None:
        """Id of the run with this identity, whatever its status; None if there is none."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{IDENTITY_TAG}` = '{identity}'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            max_results=1,
        )
        return runs[0].info.run_id if runs else None

    def existing_run(self, identity: str) -> str:
        """Id of the run with this identity.

        Raises:
            TrackingUnavailable: If there is none yet: the record that creates it may still be in the driver's outbox.
        """
        run_id = self.find_run(identity)
        if run_id is None:
            raise TrackingUnavailable(f"the run {identity} has not been recorded yet")
        return run_id

    def find_or_create_run(self, name: str, identity: str, parent_run_id: str | None = None) -> str:
        """Id of the one run with this identity, in status RUNNING. A run that exists keeps its name and parent."""
        with self.exclusive():
            run_id = self.find_run(identity)
            if run_id is None:
                identifying = {
                    IDENTITY_TAG: identity,
                    "mlflow.source.name": os.path.basename(sys.argv[0]) or "python",
                    "mlflow.source.type": "LOCAL",
                    "mlflow.user": os.environ.get("USER") or str(os.getuid()),
                }
                if parent_run_id:
                    identifying["mlflow.parentRunId"] = parent_run_id
                created = self.client.create_run(self.experiment_id, tags=identifying, run_name=name).info.run_id
                # A server has no lock: if several drivers created a run at the same time, all of them keep the oldest.
                run_id = self.find_run(identity) or created
                if run_id != created:
                    self.client.delete_run(created)
            elif self.client.get_run(run_id).info.status != "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
        return run_id

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags; values are truncated to MLflow's limit."""
        entities = [RunTag(key, _text(value)[:MAX_TAG_VAL_LENGTH]) for key, value in tags.items()]
        self.client.log_batch(run_id, tags=entities, synchronous=True)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs flat parameters; values are truncated to MLflow's limit.

        MLflow's parameters are immutable. If one was logged with another value, the new value becomes the tag
        `changed.<name>`: for example, a resumed run may have another number of workers.
        """
        logged = self.client.get_run(run_id).data.params
        values = {key: _text(value)[:MAX_PARAM_VAL_LENGTH] for key, value in params.items()}
        new = [Param(key, value) for key, value in values.items() if key not in logged]
        self.client.log_batch(run_id, params=new, synchronous=True)
        changed = {key: value for key, value in values.items() if logged.get(key, value) != value}
        self.set_tags(run_id, {f"changed.{key}": value for key, value in changed.items()})

    def log_history(self, run_id: str, history: Sequence[Mapping[str, float]]) -> None:
        """Logs the metrics of epochs. What a metric already has is skipped, so a whole history may be repeated.

        MLflow deletes no point. A step with another value, of an epoch that was trained again, gets a new point with a
        later timestamp; the one with the latest timestamp counts.

        Args:
            history: One mapping per epoch: `epoch`, its 1-based number, which becomes the step; optionally `timestamp`
                (seconds since 1970); all other items are metrics, which may be NaN or infinite.
        """
        now = time.time()
        metrics = []
        for row in history:
            step, timestamp = int(row["epoch"]), int(1000 * row.get("timestamp", now))
            for key in row.keys() - {"epoch", "timestamp"}:
                before, value = self._points(run_id, key).get(step, []), float(row[key])
                # A record of before that is sent once more, after that of the epoch that was trained again, is no news.
                if any(_same(was, value) for at, was in before if at in (timestamp, before[-1][0])):
                    continue
                metrics.append(Metric(key, value, max([timestamp, *(at + 1 for at, _ in before)]), step))
        try:
            self.client.log_batch(run_id, metrics=metrics, synchronous=True)
        except Exception:
            for metric in metrics:  # the server may have stored some of them: ask it again
                self._history.pop((run_id, metric.key), None)
            raise
        for metric in metrics:
            self._points(run_id, metric.key).setdefault(metric.step, []).append((metric.timestamp, metric.value))

    def _points(self, run_id: str, key: str) -> dict[int, list[tuple[int, float]]]:
        """Timestamp and value of all points of a metric by step, those of a step by timestamp."""
        if (run_id, key) not in self._history:
            points: dict[int, list[tuple[int, float]]] = {}
            for metric in sorted(self.client.get_metric_history(run_id, key), key=lambda metric: metric.timestamp):
                points.setdefault(metric.step, []).append((metric.timestamp, metric.value))
            self._history[run_id, key] = points
        return self._history[run_id, key]

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Logs final values at step 0; a metric that already has the same value is skipped.

        MLflow shows the value with the latest timestamp, so a new one gets a later timestamp than that before it, also
        if the clock was set back meanwhile.
        """
        logged = self.client.get_run(run_id).data.metrics
        changed = {key: float(value) for key, value in metrics.items() if not _same(logged.get(key), float(value))}
        entities = []
        for key, value in changed.items():
            before = self.client.get_metric_history(run_id, key) if key in logged else ()
            latest = max((metric.timestamp + 1 for metric in before), default=0)
            entities.append(Metric(key, value, max(int(1000 * time.time()), latest), 0))
        self.client.log_batch(run_id, metrics=entities, synchronous=True)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self.client.log_text(run_id, _text(text), path)

    def log_file(self, run_id: str, file: str | Path, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, os.fspath(file), folder)

    def log_dataset(
        self, run_id: str, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Adds a data set to the inputs of the run.

        Args:
            name: Name of the data set.
            digest: SHA-256 in hex. MLflow's digest field holds its first 36 characters, the tag `dataset.sha256` all.
            source: Path or URI of the data.
            context: What the data are used for, e.g. `training`.
            profile: Summary of the data, e.g. the number of rows.
        """
        scheme = urlsplit(source).scheme
        is_web = scheme in ("http", "https")
        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="http" if is_web else scheme.replace("file", "local") or "local",
            source=json.dumps({"url" if is_web else "uri": _text(source)}),
            profile=json.dumps(dict(profile or {})),
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("sha256", digest)]
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])
        self.set_tags(run_id, {"dataset.sha256": digest})

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run with the status FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)


def _text(value: Any) -> str:
    """`value` as a text that every database takes: without zeros, and bytes of a name that are no UTF-8 written out."""
    return str(value).replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def _same(logged: float | None, value: float) -> bool:
    """Whether a store that has `logged` was given `value`; databases keep the largest number for an infinite one."""
    kept = max(-sys.float_info.max, min(sys.float_info.max, value))
    return logged is not None and (logged in (value, kept) or (math.isnan(logged) and math.isnan(value)))
