"""What of a run goes to MLflow, and when: a parent run, a child each task, a grandchild each trial.

Written by the driver, on a thread of its own: a tracking server that is slow or gone holds up neither the tasks nor the
display. Each call may be repeated by a driver that goes on after another was killed.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config import PipelineConfig, flatten
from pipeline.tracking import BackgroundTracker, Tracker, environment_tags
from pipeline.workflow import Stopped

FLUSH_SECONDS = 60.0
SCORES = ("top1", "top5", "loss")


class RunLog:
    """Records one run of the pipeline.

    Args:
        identity: of the run; the same when it is started again.
        preset: its name, which becomes the name of the run.

    Raises:
        MlflowException: if the tracking store does not answer; it takes minutes to say so.
    """

    def __init__(self, config: PipelineConfig, identity: str, preset: str) -> None:
        self.identity, self._config = identity, config
        self._tracker = Tracker(config.tracking_uri, config.tracking.experiment, config.artifact_location)
        self.run_id = self._tracker.find_or_create_run(preset, identity, tags=environment_tags() | {"preset": preset})
        self._runs: dict[str, str] = {}
        self._background = BackgroundTracker()
        self._background.submit(self._tracker.log_params, self.run_id, flatten(config))
        self._background.submit(self._tracker.log_dict, self.run_id, flatten(config), "config.json")

    def done_before(self, manifests: Mapping[str, Mapping[str, Any]]) -> None:
        """Notes on the parent run which tasks an earlier run has done."""
        self._background.submit(self._log_done_before, manifests)

    def started(self, task: str) -> None:
        self._background.submit(self._run, task)

    def event(self, event: Mapping[str, Any]) -> None:
        if "metrics" in event:  # how an epoch gets on is for the display only
            self._background.submit(self._log_event, event)

    def done(self, task: str, manifest: Mapping[str, Any]) -> None:
        self._background.submit(self._log_done, task, manifest)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the parent run, and what is open below it, by how the block ended; waits until all is sent."""
        status = "FINISHED" if kind is None else "KILLED" if kind is Stopped else "FAILED"
        self._background.submit(self._finish, status)
        self._background.close(FLUSH_SECONDS)

    def _run(self, name: str, parent: str | None = None) -> str:
        """Run of a task, or of a trial below its task."""
        if name not in self._runs:
            above = self._run(parent) if parent else self.run_id
            title = name.rpartition("/")[2]
            self._runs[name] = self._tracker.find_or_create_run(title, f"{self.identity}/{name}", above)
        return self._runs[name]

    def _log_event(self, event: Mapping[str, Any]) -> None:
        if event["task"] == "search":
            run_id = self._run(f"search/{event['trial']}", parent="search")
            self._tracker.log_params(run_id, event["values"])
        else:
            run_id = self._run(event["task"])
        self._tracker.log_history(run_id, [event["metrics"]])

    def _log_done_before(self, manifests: Mapping[str, Mapping[str, Any]]) -> None:
        self._tracker.set_tags(self.run_id, {f"done_before.{task}": m["key"] for task, m in manifests.items()})
        if "preprocess" in manifests:
            self._log_dataset(self.run_id, manifests["preprocess"])

    def _log_dataset(self, run_id: str, preprocessed: Mapping[str, Any]) -> None:
        output = preprocessed["output"]
        rows = {name: split["rows"] for name, split in output["splits"].items()}
        place = f"{self._config.storage}/tasks/preprocess/{preprocessed['key']}"
        self._tracker.log_dataset(run_id, self._config.data.source, output["digest"], place, "training", rows)

    def _log_done(self, task: str, manifest: Mapping[str, Any]) -> None:
        run_id, output, tracker = self._run(task), manifest["output"], self._tracker
        tracker.set_tags(run_id, {"task.key": manifest["key"]})
        tracker.log_metrics(run_id, {"seconds": manifest["seconds"]})
        if task == "preprocess":
            self._log_dataset(run_id, manifest)
            self._log_dataset(self.run_id, manifest)
        elif task == "search" and output["best"]:
            for trial in output["trials"]:
                trial_run = self._run(f"search/{trial['id']}", parent="search")
                tracker.log_params(trial_run, trial["values"])
                tracker.set_tags(trial_run, {"trial.status": trial["status"]})
                tracker.finish(trial_run, "FAILED" if trial["status"] == "failed" else "FINISHED")
                del self._runs[f"search/{trial['id']}"]
            tracker.log_params(run_id, {f"best.{name}": value for name, value in output["best"].items()})
            tracker.log_metrics(run_id, {"best_val_accuracy": output["best_value"]})
        elif task == "train":
            tracker.log_history(run_id, output["history"])
            tracker.log_metrics(run_id, {"median_images_per_second": output["images_per_second"]})
        elif task == "evaluate":
            scores = {f"test_{name}": output[name] for name in SCORES}
            tracker.log_metrics(run_id, scores)
            tracker.log_metrics(self.run_id, scores)
            tracker.log_dict(run_id, {"per_class": output["per_class"]}, "per_class.json")
        elif task == "register":
            tracker.set_tags(self.run_id, {"model.uri": output["uri"]})
        tracker.finish(run_id)
        del self._runs[task]

    def _finish(self, status: str) -> None:
        for run_id in (*self._runs.values(), self.run_id):
            self._tracker.finish(run_id, status)
