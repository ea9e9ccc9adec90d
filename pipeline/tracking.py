"""Runs in MLflow: parameters, metrics, files and data sets, each once however often a call is repeated.

All goes through one `MlflowClient` with an explicit URI. There is no active run and no global tracking URI, so
MLFLOW_RUN_ID and its like in the environment change nothing. What a killed driver may repeat is safe to repeat: runs
carry the tag `pipeline.identity`, and are looked up by it before they are made.
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

TrackingError = MlflowException  # for modules that do not import MLflow
T = TypeVar("T")
IDENTITY_TAG = "pipeline.identity"
# MLflow takes these from nowhere else, at each call, unless the user has set them.
ENVIRONMENT = {
    # It would ask a server that does not answer for four minutes a call; who waits here asks again by himself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for every run that ends
}
RETRY_SECONDS = 2.0
# What MLflow answers where the same call will never succeed.
REFUSALS = {"BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}


def client_of(uri: str | None) -> MlflowClient:
    """Of the store and the registry at `uri`; its calls end in bounded time where a server does not answer."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class TrackingUnavailable(RuntimeError):
    """The tracking store has not answered for too long."""


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later: the store did not answer, or it failed; it has not declined."""
    if isinstance(error, MlflowException):
        return error.error_code not in REFUSALS
    return isinstance(error, (OSError, TrackingUnavailable)) and not isinstance(error, FileNotFoundError)


def patiently(call: Callable[[], T], uri: str, seconds: float) -> T:
    """What `call` returns, which may be repeated: a store that does not answer is asked again for so many seconds.

    Raises:
        TrackingUnavailable: after that; names `uri`.
        Exception: what `call` raises where it is no use to try again.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            if time.monotonic() > end:
                raise TrackingUnavailable(
                    f"tracking.uri = {uri} has not answered for {seconds:.0f} s: the same command goes on from here "
                    f"when it does ({error})"
                ) from error
            time.sleep(RETRY_SECONDS)


class Tracker:
    """Runs of one experiment.

    Args:
        uri: tracking and registry URI, e.g. `sqlite:////runs/mlflow.db` or `http://host:5000`.
        experiment: name of the experiment; created if it is absent.
        artifact_location: where a new experiment keeps its files; None leaves it to the server. Of an SQLite store give
            it always: MLflow's default lies in the working directory.

    Raises:
        ValueError: if the experiment was deleted.
        MlflowException: if the store does not answer.
    """

    def __init__(self, uri: str, experiment: str, artifact_location: str | None = None) -> None:
        self.uri = uri
        self._lock: Path | None = None
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            self._lock = database.with_name(f"{database.name}.lock")
        with self.exclusive():
            self.client = client_of(uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                try:
                    self.client.create_experiment(experiment, artifact_location)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":  # a server, and another driver was faster
                        raise
                found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"tracking.experiment = {experiment!r} was deleted from {uri}; choose another name or run "
                f"`mlflow experiments restore -x {found.experiment_id}`"
            )
        self.experiment_id: str = found.experiment_id
        self._steps: dict[tuple[str, str], set[int]] = {}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One process at a time, for an SQLite store; a server's is not locked.

        MLflow does not lock the making of its tables, and knows no unique tags. The lock ends with its process, so a
        killed one leaves none behind. It does not nest.
        """
        with open(self._lock, "a") if self._lock else nullcontext() as lock:
            if lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def find_run(self, identity: str) -> str | None:
        """The run with this identity, whatever its status; None if there is none."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{IDENTITY_TAG}` = '{identity}'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            max_results=1,
        )
        return runs[0].info.run_id if runs else None

    def run(self, identity: str) -> str:
        """The run with this identity.

        Raises:
            TrackingUnavailable: if there is none yet: it is still on its way, from another process.
        """
        run_id = self.find_run(identity)
        if run_id is None:
            raise TrackingUnavailable(f"the run {identity} has not been recorded yet")
        return run_id

    def find_or_create_run(
        self, name: str, identity: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """The one run with this identity, in status RUNNING. A run that is found keeps its name and parent."""
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
                # A server has no lock: of drivers that got here together, all keep the oldest run.
                run_id = self.find_run(identity) or created
                if run_id != created:
                    self.client.delete_run(created)
            elif self.client.get_run(run_id).info.status != "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
        if tags:
            self.set_tags(run_id, tags)
        return run_id

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Sets tags; values beyond MLflow's limit are cut."""
        entities = [RunTag(key, str(value)[:MAX_TAG_VAL_LENGTH]) for key, value in tags.items()]
        self.client.log_batch(run_id, tags=entities, synchronous=True)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Logs flat parameters; values beyond MLflow's limit are cut.

        MLflow's parameters never change. One that was logged with another value keeps it, and the new value becomes the
        tag `changed.<name>`: a resumed run may have another number of workers.
        """
        logged = self.client.get_run(run_id).data.params
        values = {key: str(value)[:MAX_PARAM_VAL_LENGTH] for key, value in params.items()}
        new = [Param(key, value) for key, value in values.items() if key not in logged]
        self.client.log_batch(run_id, params=new, synchronous=True)
        changed = {key: value for key, value in values.items() if logged.get(key, value) != value}
        self.set_tags(run_id, {f"changed.{key}": value for key, value in changed.items()})

    def log_history(self, run_id: str, history: Sequence[Mapping[str, float]]) -> None:
        """Logs the metrics of each epoch; a step that a metric already has is left as it is, so that the whole history
        may be sent again.

        Args:
            history: a mapping an epoch with its 1-based number as `epoch`, and perhaps the time as `timestamp`
                (seconds since 1970); all else are metrics. NaN and infinities are logged too.
        """
        now = time.time()
        metrics = []
        for row in history:
            step, timestamp = int(row["epoch"]), int(1000 * row.get("timestamp", now))
            for key in row.keys() - {"epoch", "timestamp"}:
                if step not in self._logged_steps(run_id, key):
                    metrics.append(Metric(key, float(row[key]), timestamp, step))
        try:
            self.client.log_batch(run_id, metrics=metrics, synchronous=True)
        except Exception:
            for metric in metrics:  # some may have arrived, although the answer has not: to be asked for
                self._steps.pop((run_id, metric.key), None)
            raise
        for metric in metrics:
            self._steps[run_id, metric.key].add(metric.step)

    def _logged_steps(self, run_id: str, key: str) -> set[int]:
        if (run_id, key) not in self._steps:
            self._steps[run_id, key] = {metric.step for metric in self.client.get_metric_history(run_id, key)}
        return self._steps[run_id, key]

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Logs final values (step 0); one that is logged already with the same value is left out."""
        logged = self.client.get_run(run_id).data.metrics
        changed = {key: float(value) for key, value in metrics.items() if not _same(logged.get(key), float(value))}
        now = int(1000 * time.time())
        entities = [Metric(key, value, now, 0) for key, value in changed.items()]
        self.client.log_batch(run_id, metrics=entities, synchronous=True)

    def log_dict(self, run_id: str, value: Mapping[str, Any], path: str) -> None:
        """Writes `value` as JSON or YAML, by the suffix of `path`, below the run's artifacts."""
        self.client.log_dict(run_id, dict(value), path)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self.client.log_text(run_id, text, path)

    def log_file(self, run_id: str, file: str | Path, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, os.fspath(file), folder)

    def log_dataset(
        self, run_id: str, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Makes a data set an input of the run.

        Args:
            digest: SHA-256 in hex. MLflow's field holds its first 36 characters, the tag `dataset.sha256` all.
            source: path or URI of the data.
            context: what it is used for, e.g. `training`.
            profile: rows, classes and the like.
        """
        scheme = urlsplit(source).scheme
        is_web = scheme in ("http", "https")
        dataset = Dataset(
            name=name,
            digest=digest[:36],
            source_type="http" if is_web else scheme.replace("file", "local") or "local",
            source=json.dumps({"url" if is_web else "uri": source}),
            profile=json.dumps(dict(profile or {})),
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("sha256", digest)]
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])
        self.set_tags(run_id, {"dataset.sha256": digest})

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)


def _same(logged: float | None, value: float) -> bool:
    return logged is not None and (logged == value or (math.isnan(logged) and math.isnan(value)))
