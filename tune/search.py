"""Hyperparameter search with Ray Tune: Optuna's TPE proposes trials, ASHA stops those that fall behind.

The caller supplies the training, so that a trial is trained by the same code as the final model. A search that was cut
off continues from the trials in its journal (`tune.journal`); Tune's own snapshots are not used.
"""

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup

from tune.asha import ResumableASHA
from tune.config import SearchConfig
from tune.journal import OBJECTIVE, SCORE, Journal, Trial, best_of, no_best, score
from tune.resources import concurrent_trials
from tune.space import Space
from tune.trial_process import TrainTrial, TrialProcess
from tune.trial_queue import TrialQueue, Watch, restart_if_all_failed

# A process may die for reasons other than its trial, e.g. because its host goes away. So a trial gets a second process.
MAX_DEATHS = 2


def search(
    train_trial: TrainTrial,
    space: Space,
    settings: SearchConfig,
    *,
    journal: Journal,
    storage_path: str,
    name: str | None = None,
    use_gpu: bool = False,
    preset: Mapping[str, Any] | None = None,
    warmup_epochs: float = 0.0,
    watch: Watch = lambda trial, seconds_left, new_epoch: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs `settings.num_trials` trials. Called again with the same journal, a search that was cut off continues, and
    one that has ended without a best trial, since all have failed, tries them again.

    Args:
        train_trial: trains a trial.
        journal: stores the trials.
        storage_path: folder or URI, visible to all nodes, for the files of Ray Tune; they are not needed afterwards.
        name: what tells this search from all others on the cluster, also when it is called again; None: `storage_path`.
        use_gpu: whether each worker of a trial has a GPU.
        preset: known good values of the dimensions, which are tried first.
        warmup_epochs: epochs over which a trial raises its learning rate; no trial is stopped in them.
        watch: called for every trial when it starts, after each new epoch, and when it ends; and, when the first one
            starts, for those that ended before this call.
        say: takes a line for the person who waits.

    Returns:
        `best` (sampled and fixed values of the best trial), `best_value` (its highest validation accuracy),
        `best_trial` (its name in the search that ran it), `earlier` (number of trials used from earlier searches; the
        best one may be among them) and `trials` (the fields of each `Trial` of this search, and its `best_value`).

    Raises:
        RuntimeError: if no trial within the cost limit completed an epoch; the message holds the first one's error.
        ValueError: if the cluster is too small for a trial.
    """
    cluster = ray.cluster_resources()
    concurrent = concurrent_trials(
        cluster.get("CPU", 0),
        cluster.get("GPU", 0),
        workers=settings.workers_per_trial,
        cpus_per_worker=settings.cpus_per_trial,
        gpus_per_worker=float(use_gpu),
        limit=settings.max_concurrent_trials,
    )
    earlier = journal.earlier(space) if settings.use_earlier_trials else []
    restart_if_all_failed(journal, earlier, settings, say)
    queue = TrialQueue(space, settings, journal, earlier, preset, concurrent, watch)
    if queue.num_left:
        asha = scheduler(settings, [*earlier, *queue.ended], warmup_epochs)
        _run(train_trial, settings, queue, journal, storage_path, name or storage_path, use_gpu, asha)
    best = best_of([*queue.trials, *earlier], settings)
    if best is None:
        raise RuntimeError(no_best(queue.trials, settings))
    return {
        "best": best.values,
        "best_value": best.best_value,
        "best_trial": best.name,
        "earlier": len(earlier),
        "trials": [asdict(trial) | {"best_value": trial.best_value} for trial in queue.trials],
    }


def scheduler(settings: SearchConfig, ended: Sequence[Trial] = (), warmup_epochs: float = 0.0) -> TrialScheduler:
    """ASHA over the epochs, with the results of the trials in `ended`; FIFO if early stopping is off.

    A trial whose learning rate still rises has not shown what it is worth, and one with a low rate looks worse than it
    is: the first rung is at the end of the first epoch that ends after the warm-up, or later.
    """
    if not settings.early_stopping:
        return FIFOScheduler()
    # Replays the ended trials through Tune's own interface. ASHA uses a trial's id only, and no Tune controller.
    grace = min(settings.epochs, max(settings.grace_epochs, math.floor(warmup_epochs) + 1))
    asha: Any = ResumableASHA(settings.epochs, grace, settings.reduction_factor)
    for number, trial in enumerate(ended):  # the name alone is not unique across searches
        stand_in = SimpleNamespace(trial_id=f"{number}/{trial.name}")
        asha.on_trial_add(None, stand_in)
        for row in trial.history:
            value = score(row[OBJECTIVE], trial.gflops, settings)
            asha.on_trial_result(None, stand_in, {"epoch": row["epoch"], SCORE: value})
    return asha


class _Proposer(Searcher):
    """Supplies Ray Tune with trials from the queue, and records their results."""

    def __init__(self, queue: TrialQueue, journal: Journal) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._queue, self._journal = queue, journal
        self._running: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        """Config of the next trial; None while all places are taken, `Searcher.FINISHED` after the last trial."""
        if len(self._running) >= self._queue.concurrent:
            return None  # Tune asks ahead of time; a later proposal can use the results of running trials
        trial = self._queue.next()
        if trial is None:
            return Searcher.FINISHED
        self._running[trial_id] = trial
        return {"trial": trial.name, "values": trial.values, "gflops": trial.gflops}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        # Tune flattens nested results; their keys become paths.
        metrics = {key.removeprefix("metrics/"): value for key, value in result.items() if key.startswith("metrics/")}
        if metrics:
            self._queue.add_epoch(self._running[trial_id], metrics)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        result = result or {}
        self.on_trial_result(trial_id, result)
        trial, problem = self._running.pop(trial_id), result.get("error")
        if error and not problem:
            problem = self._journal.death(trial.name) or f"its process died {MAX_DEATHS} times"
        self._queue.end(trial, result.get("ended", False), problem)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing, since the journal holds everything."""

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """Does nothing, since the journal holds everything."""


def _run(
    train_trial: TrainTrial,
    settings: SearchConfig,
    queue: TrialQueue,
    journal: Journal,
    storage_path: str,
    name: str,
    use_gpu: bool,
    asha: TrialScheduler,
) -> None:
    """Runs the remaining trials."""
    # Ray writes the names of placement groups to its logs, where a URI with a login has no place.
    groups = hashlib.sha256(name.encode()).hexdigest()
    _free_trial_resources(groups)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(TrialProcess, train_trial=train_trial, journal=journal, settings=settings),
        _TrialResources(_bundle(settings, use_gpu), groups),
    )
    # Nobody reads the result files that Tune writes for itself and TensorBoard. A failed trial has no score to check.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    # Starts all trial processes at once; by default Tune waits for each before it asks for the next.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(queue.concurrent)
    ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            num_samples=queue.num_left,
            search_alg=_Proposer(queue, journal),
            scheduler=asha,
            reuse_actors=True,
        ),
        run_config=ray.tune.RunConfig(
            name=f"tune-{uuid.uuid4().hex[:8]}",
            storage_path=storage_path,
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # `train_trial` writes its own
            failure_config=ray.tune.FailureConfig(max_failures=MAX_DEATHS - 1),
            verbose=0,
        ),
    ).fit()


def _bundle(settings: SearchConfig, use_gpu: bool) -> dict[str, float]:
    """Resources of a trial process. Several workers are separate processes that reserve their own resources."""
    if settings.workers_per_trial > 1:
        return {"node:__internal_head__": 0.001}  # Ray rejects an empty bundle
    return {"CPU": settings.cpus_per_trial} | ({"GPU": 1.0} if use_gpu else {})


class _TrialResources(ray.tune.PlacementGroupFactory):
    """Resources of a trial in a named placement group.

    Ray frees a placement group at the end of the job, not of the process that created it. A search that was killed and
    started again in the same job would wait forever for its own resources, so it frees them by their name first.
    """

    def __init__(self, bundle: dict[str, float], search: str) -> None:
        super().__init__([bundle])
        self._search = search

    def to_placement_group(self) -> PlacementGroup:
        return ray.util.placement_group(self.bundles, name=f"{self._search}#{uuid.uuid4().hex}")


def _free_trial_resources(search: str) -> None:
    """Removes the placement groups that a killed process of the search has left."""
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{search}#") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
