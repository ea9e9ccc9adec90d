"""Hyperparameter search with Ray Tune: Optuna's TPE samples, ASHA stops what falls behind.

The training itself is handed in, so that a trial is trained by the same code as the final model.
"""

import contextlib
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import optuna
import pyarrow.fs
import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.placement_group import PlacementGroup

from tune.config import SearchConfig
from tune.space import fixed_values, param_space

OBJECTIVE = "val_accuracy"
Report = Callable[[dict[str, Any], Path | None], None]


class TrialDriver(Protocol):
    """Trains one sample in the calling process.

    It reports metrics, `val_accuracy` and `epoch` among them, with a checkpoint folder after every epoch, and goes on
    from `resume_from` where that is given. `trial` names the trial.
    """

    def __call__(
        self, sample: dict[str, Any], data: Any, *, trial: str, report: Report, resume_from: Path | None
    ) -> None: ...


def search(driver: TrialDriver, data: Any, settings: SearchConfig, *, storage_path: str, name: str) -> dict[str, Any]:
    """Runs `settings.num_trials` trials; one that was cut off goes on when called again with the same place.

    Args:
        driver: trains a trial.
        data: handed to every trial; kept once in the object store of each node.
        storage_path: folder or URI below which Tune keeps the state of the search.
        name: of the search, a folder below `storage_path`.

    Returns:
        `best` (sampled and fixed values of the best trial), `best_value` (its best validation accuracy), `best_trial`
        (its id) and `trials`: id, values, status, error, epochs and best value of each.

    Raises:
        RuntimeError: if no trial came as far as one epoch; holds the first trial's error.
    """
    fixed = fixed_values(settings)

    def trial(config: dict[str, Any], data: Any) -> None:
        def report(metrics: dict[str, Any], folder: Path | None) -> None:
            if OBJECTIVE in metrics:
                ray.tune.report(metrics, checkpoint=ray.tune.Checkpoint.from_directory(folder) if folder else None)

        checkpoint = ray.tune.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
            driver(
                fixed | config,
                data,
                trial=ray.tune.get_context().get_trial_id(),
                report=report,
                resume_from=Path(folder) if folder else None,
            )

    root, mark, options = storage_path.partition("?")  # of a URI
    path = f"{root}/{name}{mark}{options}"
    _free_trial_cpus(path)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(trial, data=data), resources=_TrialCpus(settings.cpus_per_trial, path)
    )
    if _can_restore(path):
        tuner = ray.tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=param_space(settings),
            tune_config=ray.tune.TuneConfig(
                metric=OBJECTIVE,
                mode="max",
                num_samples=settings.num_trials,
                search_alg=OptunaSearch(sampler=optuna.samplers.TPESampler(seed=settings.seed, multivariate=True)),
                scheduler=ASHAScheduler(
                    time_attr="epoch",  # not training_iteration, which starts at 1 again after a restore
                    max_t=settings.epochs,
                    grace_period=settings.grace_epochs,
                    reduction_factor=settings.reduction_factor,
                ),
            ),
            run_config=ray.tune.RunConfig(
                name=name,
                storage_path=storage_path,
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
                failure_config=ray.tune.FailureConfig(max_failures=1),
                verbose=0,
            ),
        )
    return _summary(tuner.fit(), fixed)


class _TrialCpus(ray.tune.PlacementGroupFactory):
    """CPUs of a trial, under a name by which they are found again.

    Ray frees them at the end of the job, not of the process that asked for them: one that was killed and is started
    again in the same job would wait for them for ever.
    """

    def __init__(self, cpus: float, search: str) -> None:
        super().__init__([{"CPU": cpus}])
        self._search = search

    def to_placement_group(self) -> PlacementGroup:
        return ray.util.placement_group(self.bundles, name=f"{self._search}#{uuid.uuid4().hex}")


def _free_trial_cpus(search: str) -> None:
    """Frees what a killed process has left of the search."""
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{search}#") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def _can_restore(path: str) -> bool:
    """Whether a search was begun there. `Tuner.can_restore` says so too where it ended before it had any state."""
    filesystem, root = pyarrow.fs.FileSystem.from_uri(path)
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
    return ray.tune.Tuner.can_restore(path) and any(info.base_name.startswith("experiment_state-") for info in found)


def _summary(results: ray.tune.ResultGrid, fixed: dict[str, Any]) -> dict[str, Any]:
    trials = []
    for result in (results[i] for i in range(len(results))):
        metrics = result.metrics or {}
        frame = result.metrics_dataframe
        values = [] if frame is None or OBJECTIVE not in frame else [v for v in frame[OBJECTIVE] if math.isfinite(v)]
        trials.append(
            {
                "id": metrics.get("trial_id", Path(result.path).name),
                "values": fixed | (result.config or {}),
                "status": "failed" if result.error else "finished",
                "error": _one_line(result.error) if result.error else None,
                "epochs": int(metrics.get("epoch", 0)),
                "best_value": max(values, default=None),
            }
        )
    reached = [trial for trial in trials if trial["best_value"] is not None]
    if not reached:
        raise RuntimeError(f"no trial came as far as one epoch; the first one: {trials[0]['error']}")
    best = max(reached, key=lambda trial: trial["best_value"])
    return {"best": best["values"], "best_value": best["best_value"], "best_trial": best["id"], "trials": trials}


def _one_line(error: Exception) -> str:
    """What a trial raised, without Ray's traceback around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"
