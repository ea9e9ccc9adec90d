"""What is recorded of a run in MLflow, and when: a parent run, a child run a task, a grandchild run a trial.

The driver writes records to an outbox on disk, from which a thread sends them. A tracking server that is slow or gone
delays neither the tasks nor the display, and gets what it missed later, from the next driver if need be.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from perceiver import cost
from pipeline.masking import masked
from pipeline.settings.config import PipelineConfig, flatten, trained_configs
from pipeline.storage import Storage
from pipeline.tasks.events import TrialChanged
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.outbox import Record, Unsent
from pipeline.tracking.provenance import EnergyMeter, cluster_hardware, collect_provenance, training_cost
from pipeline.tracking.sender import Sender
from pipeline.tracking.tracker import Tracker
from pipeline.training.worker import EpochEnded
from pipeline.workflow.lease import LeaseLost
from pipeline.workflow.task import Stopped

FLUSH_SECONDS, FLUSH_SECONDS_OF_A_STOP = 60.0, 10.0
QUIET_SECONDS = 3.0
ENERGY_SECONDS = 10.0


class RunLog:
    """Records one run of the pipeline; an observer of its tasks.

    Args:
        config: Configuration of the run.
        identity: Unique id of the run; the same when the run is restarted.
        preset: Name of the preset, which becomes the name of the MLflow run.
        say: Prints a line for a person who waits.

    Raises:
        ValueError: if the experiment was deleted, or the server refuses the login.
    """

    def __init__(
        self, config: PipelineConfig, identity: str, preset: str, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self._config, self._say = config, say
        self._sender = open_sender(config, identity, preset)
        self._open_runs: dict[str, None] = {}  # in order: children end before their parents
        self._energy, self._sampled = EnergyMeter(), time.monotonic()
        self._kwh_at_start: dict[str, float] = {}
        self._outputs: dict[str, dict[str, Any]] = {}
        self.unsent: Unsent | None = None
        about, settings = collect_provenance(), flatten(config)
        nodes = cluster_hardware(ray.nodes()) if ray.is_initialized() else []
        self._record(
            tags={**about.tags, "preset": preset},
            params=_texts(settings),
            texts={
                **about.texts,
                "config.json": json.dumps(settings, indent=1),
                "hardware.json": json.dumps(nodes, indent=1),
            },
        )

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the parent run; None if the server has not been reached yet."""
        return self._sender.run_id

    def done_before(self, manifests: Mapping[str, Mapping[str, Any]]) -> None:
        """Records on the parent run which tasks an earlier run has done."""
        self._outputs = {task: manifest["output"] for task, manifest in manifests.items()}
        self._record(tags={f"done_before.{task}": manifest["key"] for task, manifest in manifests.items()})
        if "preprocess" in manifests:
            self._record(dataset=self._dataset(manifests["preprocess"]))

    def started(self, task: str) -> None:
        self._record(task)
        self._sample_energy(0)
        self._kwh_at_start[task] = self._energy.kwh or 0.0

    def reported(self, event: object) -> None:
        self._sample_energy(ENERGY_SECONDS)
        if isinstance(event, EpochEnded):
            self._record("train", history=(_stamped(event.metrics),))
        elif isinstance(event, TrialChanged) and event.metrics is not None:
            history = (_stamped(event.metrics),)
            self._record(f"search/{event.trial}", params=_texts(event.values), history=history)

    def done(self, task: str, manifest: Mapping[str, Any]) -> None:
        output = self._outputs[task] = manifest["output"]
        self._record(task, tags={"task.key": manifest["key"]}, metrics={"seconds": manifest["seconds"]})
        self._sample_energy(0)
        if self._energy.kwh is not None:
            self._record(task, metrics={"host_kwh": self._energy.kwh - self._kwh_at_start.get(task, 0.0)})
        if task == "preprocess":
            self._record(task, dataset=self._dataset(manifest))
            self._record(dataset=self._dataset(manifest))
        elif task == "search" and output["best"]:
            self._search_done(output)
        elif task == "train":
            self._training_done(output)
        elif task == "evaluate":
            scores = {f"test_{name}": value for name, value in output.items() if isinstance(value, float)}
            per_class = json.dumps({"per_class": output["per_class"]}, indent=1)
            self._record(task, metrics=scores, texts={"per_class.json": per_class})
            self._record(metrics=scores)
        elif task == "register":
            decision = {"model.alias": output["alias"], "promotion.reason": output["reason"]}
            self._record(tags={"model.uri": output["uri"], **decision})
        elif task == "report":
            self._record(files={"report.html": output["report"]["path"]})
        self._record(task, status="FINISHED")

    def _search_done(self, output: Mapping[str, Any]) -> None:
        for trial in output["trials"]:
            status = "FAILED" if trial["status"] == "failed" else "FINISHED"
            tags = {"trial.status": trial["status"]} | ({"trial.error": trial["error"]} if trial["error"] else {})
            # The history again: a driver that was killed may have lost the event of an epoch.
            what = {"params": _texts(trial["values"]), "history": tuple(trial["history"]), "tags": tags}
            self._record(f"search/{trial['name']}", **what, status=status)
        best = {f"best.{name}": str(value) for name, value in output["best"].items()}
        figures = {f"figures/{Path(path).name}": path for path in output["figures"]}
        self._record("search", params=best, metrics={"best_val_accuracy": output["best_value"]}, files=figures)

    def _training_done(self, output: Mapping[str, Any]) -> None:
        """Records all epochs again, in case that an event was lost; speed, size, cost; settings after the search."""
        model, train = trained_configs(self._config, self._outputs.get("preprocess"), self._outputs.get("search"))
        metrics = {
            "median_images_per_second": output["images_per_second"],
            "parameters": cost.parameter_count(model),
            "forward_gflops_per_image": 2 * cost.macs_per_image(model) / 1e9,
            **training_cost(output["history"], output.get("cpus_per_worker", train.cpus_per_worker)),
        }
        history = tuple(map(_stamped, output["history"]))
        resolved = json.dumps({"model": asdict(model), "train": asdict(train)}, indent=1)
        tags = {"device": output["device"]} if "device" in output else {}  # trainings of earlier versions name none
        self._record("train", history=history, metrics=metrics, tags=tags, texts={"resolved.json": resolved})

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the parent run, and what is open below it, by how the block ended; waits a while until all is sent.

        After `LeaseLost` the runs are those of another driver, which may have ended them: nothing more is recorded.
        """
        stopped = kind is not None and issubclass(kind, (Stopped, KeyboardInterrupt))
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        lost = kind is not None and issubclass(kind, LeaseLost)
        if self._energy.kwh is not None and not lost:
            self._record(metrics={"host_kwh": self._energy.kwh})
        for run in () if lost else (*reversed(self._open_runs), ""):
            self._record(run, status=status)
        self.unsent = flush(self._sender, self._say, FLUSH_SECONDS_OF_A_STOP if stopped else FLUSH_SECONDS)

    def _record(self, run: str = "", **what: Any) -> None:
        if what.get("status"):
            self._open_runs.pop(run, None)
        elif run:
            self._open_runs[run] = None
        self._sender.record(Record(run, **masked(what)))

    def _dataset(self, preprocessed: Mapping[str, Any]) -> dict[str, Any]:
        output = preprocessed["output"]
        return {
            "name": self._config.data.source,
            "digest": output["digest"],
            "source": f"{self._config.storage}/tasks/preprocess/{preprocessed['key']}",
            "context": "training",
            "profile": {name: split["rows"] for name, split in output["splits"].items()},
        }

    def _sample_energy(self, every: float) -> None:
        if time.monotonic() - self._sampled >= every:
            self._energy.sample()
            self._sampled = time.monotonic()


def open_sender(config: PipelineConfig, identity: str, preset: str) -> Sender:
    """The sender of a run's entries, also of those that an earlier driver has left.

    Raises:
        ValueError: if the experiment was deleted, or the server refuses the login.
    """

    def open_tracker() -> Tracker:
        return Tracker(config.tracking_uri, config.tracking.experiment, config.artifact_location)

    tracker = None
    with suppress(TrackingError):  # the sender goes on asking
        tracker = open_tracker()
    return Sender(open_tracker, Storage(config.storage), identity, preset, tracker)


def flush(sender: Sender, say: Callable[[str], None], seconds: float = FLUSH_SECONDS) -> Unsent | None:
    """Waits at most `seconds` until all is sent, and says so if it takes long; returns what is left."""
    unsent = sender.close(QUIET_SECONDS)
    if unsent and unsent.waiting:
        say(f"waits up to {seconds:.0f} s for the tracking server, which has {unsent.waiting} records to take")
        unsent = sender.close(seconds - QUIET_SECONDS)
    return unsent


def _stamped(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"timestamp": time.time(), **metrics}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
