"""Everything MLflow: runs, metrics, data sets, and the registry; no other module imports mlflow.

All goes through one `MlflowClient` with an explicit URI. There is no active run and no global tracking URI, so
MLFLOW_RUN_ID and its like in the environment change nothing. What a killed driver may repeat is safe to repeat: runs,
logged models and model versions carry the tag `pipeline.identity`, and are looked up by it before they are made.
"""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from mlflow import MlflowClient, MlflowException
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

IDENTITY_TAG = "pipeline.identity"
EXPORT_REQUIREMENTS = ("mlflow", "keras", "tensorflow", "numpy")


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
        self._lock: Path | None = None
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            self._lock = database.with_name(f"{database.name}.lock")
        with self.exclusive():
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
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
        self.client.log_batch(run_id, metrics=metrics, synchronous=True)
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


class BackgroundTracker:
    """Runs calls in order on a thread of its own, so that a slow tracking server does not hold up training.

    A call that fails is dropped, and training goes on; `close` warns once.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._errors: list[Exception] = []
        # A daemon, since a server that does not answer holds a call for minutes.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls `function` later; returns at once and never raises."""
        self._calls.put(lambda: function(*args, **kwargs))

    def close(self, timeout: float = 30.0) -> None:
        """Waits at most `timeout` seconds for the calls submitted so far."""
        self._calls.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            message = f"tracking did not finish within {timeout} s; about {self._calls.qsize()} calls are lost"
            warnings.warn(message, stacklevel=2)
        elif self._errors:
            message = f"{len(self._errors)} tracking calls failed, the first with: {self._errors[0]!r}"
            warnings.warn(message, stacklevel=2)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._errors.append(error)


def environment_tags() -> dict[str, str]:
    """Git commit (if the project is a checkout), Python, machine, versions and command line, as tags of a run."""
    packages = ("keras", "tensorflow", "ray", "mlflow", "numpy", "pyarrow")
    tags = {f"version.{package}": importlib.metadata.version(package) for package in packages}
    tags["version.python"] = platform.python_version()
    tags["platform"] = platform.platform()
    tags["cpu_count"] = str(os.cpu_count())
    # URLs may carry a password.
    tags["command"] = re.sub(r"://[^/@\s]+@", "://***@", shlex.join(sys.argv))
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit yet
            tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD")
            tags["mlflow.source.git.dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    return tags


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", os.fspath(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def register(
    tracker: Tracker,
    *,
    model_path: str,
    name: str,
    identity: str,
    run_id: str,
    input_example: np.ndarray,
    label_names: Sequence[str],
    alias: str = "champion",
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Registers a trained classifier as a version of `name`, once for an identity, and gives it the alias.

    The version takes raw uint8 images and returns probabilities (n, K). It is an exported graph: it loads without this
    project and without pickle. The `.keras` file lies beside it, as `retrain/model.keras`, for training on. An alias
    never moves back to an older version.

    Args:
        model_path: local `.keras` file of a model: uint8 images to logits.
        input_example: uint8 images (n, H, W, C).
        label_names: names of the K classes in order.

    Returns:
        `name`, `version`, `alias`, `uri` (`models:/<name>/<version>`) and `model_id`.
    """
    client = tracker.client
    with tracker.exclusive():
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model = _logged_model(tracker, identity, name, run_id)
        versions = client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY_TAG}` = '{identity}'")
        if versions:
            version = min(versions, key=lambda version: int(version.version))
        else:
            if model.status != LoggedModelStatus.READY:
                with tempfile.TemporaryDirectory() as folder:
                    _export(model, folder, model_path, run_id, input_example, label_names, dict(metadata or {}))
                    client.log_model_artifacts(model.model_id, folder)
                client.finalize_logged_model(model.model_id, "READY")
            # The tag goes into the call that creates the version, so that none exists without. The source is not
            # `models:/<model_id>`: an SQL store looks that up in the global tracking URI.
            version = client.create_model_version(
                name,
                source=model.artifact_location,
                run_id=run_id,
                model_id=model.model_id,
                tags={**(tags or {}), IDENTITY_TAG: identity, "label_names": json.dumps(list(label_names))},
            )
        client.set_logged_model_tags(
            model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version.version}])}
        )
        holder = client.get_registered_model(name).aliases.get(alias)
        if holder is None or int(holder) < int(version.version):
            client.set_registered_model_alias(name, alias, version.version)
    return {
        "name": name,
        "version": str(version.version),
        "alias": alias,
        "uri": f"models:/{name}/{version.version}",
        "model_id": model.model_id,
    }


def _logged_model(tracker: Tracker, identity: str, name: str, run_id: str) -> LoggedModel:
    """The one logged model with this identity, as an output of the run; PENDING until its files are complete."""
    client = tracker.client
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


def _export(
    model: LoggedModel,
    folder: str,
    model_path: str,
    run_id: str,
    input_example: np.ndarray,
    label_names: Sequence[str],
    metadata: dict[str, Any],
) -> None:
    """Writes the MLflow model: raw uint8 images to probabilities."""
    # Here, since they load TensorFlow, and a driver that only records runs needs none of it.
    import keras
    import mlflow.keras
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    import perceiver.model  # noqa: F401  registers its classes with Keras

    classifier = keras.saving.load_model(model_path, compile=False)
    images = keras.Input(input_example.shape[1:], dtype="uint8", name="images")
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(classifier(images))
    signature = ModelSignature(
        # No names: pyfunc would make a dict of a named input, and the exported graph refuses dicts.
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *input_example.shape[1:]))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(label_names)))]),
    )
    with redirect_stdout(sys.stderr):  # Keras prints the endpoints that it exports
        mlflow.keras.save_model(
            keras.Model(images, probabilities),
            folder,
            save_exported_model=True,
            mlflow_model=Model(
                artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
            ),
            signature=signature,
            input_example=input_example,
            # Given, since MLflow would otherwise start a process that loads the model to see what it imports.
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in EXPORT_REQUIREMENTS],
            metadata={**metadata, "label_names": list(label_names)},
        )
    os.makedirs(os.path.join(folder, "retrain"))
    shutil.copy(model_path, os.path.join(folder, "retrain", "model.keras"))
