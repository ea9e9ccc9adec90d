"""Hyperparameter search with Ray Tune: Optuna's TPE proposes, ASHA stops what falls behind.

The training itself is handed in, so that a trial is trained by the same code as the final model. What is known of the
trials is in a journal (`tune.trials`), which a search that was cut off begins from: Tune's own snapshots are not used.
"""

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup

from tune.config import SearchConfig
from tune.proposals import propose
from tune.resources import concurrent_trials
from tune.slot import Slot, TrialDriver
from tune.space import Space
from tune.trials import OBJECTIVE, SCORE, Journal, Trial, best_of, score, seconds_left

# A process may die for reasons that are not the trial's: a host that goes away.
MOST_DEATHS = 2
# The trial, the seconds that the search will still take if that is known, and whether an epoch is new.
Watch = Callable[[Trial, float | None, bool], None]


def search(
    driver: TrialDriver,
    space: Space,
    settings: SearchConfig,
    *,
    journal: Journal,
    storage_path: str,
    use_gpu: bool = False,
    preset: Mapping[str, Any] | None = None,
    watch: Watch = lambda trial, seconds_left, told: None,
) -> dict[str, Any]:
    """Runs `settings.num_trials` trials; one that was cut off goes on when called again with the same place.

    Args:
        driver: trains a trial.
        journal: keeps what is known of the trials.
        storage_path: folder or URI that all nodes see, for what Ray Tune itself writes; it is not needed again.
        use_gpu: whether each worker of a trial has a GPU.
        preset: known good values of the dimensions, which are tried first.
        watch: is told of every trial when it begins, after each of its epochs, and when it ends.

    Returns:
        `best` (sampled and fixed values of the best trial), `best_value` (its highest validation accuracy),
        `best_trial` (its name), `earlier` (how many trials of earlier searches counted too; the best may be one of
        them) and `trials`: the fields of each `Trial` of this search, and its `best_value`.

    Raises:
        RuntimeError: if no trial came as far as one epoch; holds the first trial's error.
        ValueError: if the cluster can never have room for a trial.
    """
    cluster = ray.cluster_resources()
    slots = concurrent_trials(
        cluster.get("CPU", 0),
        cluster.get("GPU", 0),
        workers=settings.workers_per_trial,
        cpus_per_worker=settings.cpus_per_trial,
        gpus_per_worker=float(use_gpu),
        limit=settings.max_concurrent_trials,
    )
    earlier = journal.earlier(space) if settings.use_earlier_trials else []
    known = Known(space, settings, journal, earlier, preset, slots, watch)
    if known.left:
        _run(driver, settings, known, journal, storage_path, use_gpu)
    best = best_of([*known.trials, *earlier], settings)
    if best is None:
        errors = [trial.error for trial in known.trials if trial.error]
        raise RuntimeError(f"no trial came as far as one epoch; the first one: {errors[0] if errors else 'none ran'}")
    return {
        "best": best.values,
        "best_value": best.best_value,
        "best_trial": best.name,
        "earlier": len(earlier),
        "trials": [asdict(trial) | {"best_value": trial.best_value} for trial in known.trials],
    }


class Known:
    """The trials of a search: those of the journal, which go on first, and then new ones."""

    def __init__(
        self,
        space: Space,
        settings: SearchConfig,
        journal: Journal,
        earlier: Sequence[Trial],
        preset: Mapping[str, Any] | None,
        slots: int,
        watch: Watch,
    ) -> None:
        self.space, self.settings, self.earlier, self.slots = space, settings, earlier, slots
        self._journal, self._preset, self._watch = journal, preset, watch
        self.trials = journal.trials()
        self._cut_off = [trial for trial in self.trials if trial.status == "running"]

    @property
    def left(self) -> int:
        """Number of trials that are to be begun or gone on with."""
        return len(self._cut_off) + max(0, self.settings.num_trials - len(self.trials))

    @property
    def ended(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status != "running"]

    def next(self) -> Trial | None:
        """The next trial, written down; None if there is none left."""
        if self._cut_off:
            trial = self._cut_off.pop(0)
            trial.started = time.time()
        else:
            number = len(self.trials)
            if number >= self.settings.num_trials:
                return None
            values = propose(self.space, self.settings, number, [*self.earlier, *self.trials], self._preset)
            if values is None:
                return None
            trial = Trial.of(f"trial-{number + 1:04d}", values, self.space)
            self._journal.put(trial)
            self.trials.append(trial)
        self._tell(trial)
        return trial

    def note(self, trial: Trial, metrics: Mapping[str, Any]) -> None:
        """Takes down an epoch; one that was told before changes nothing."""
        if trial.note(metrics):
            self._tell(trial, told=True)

    def end(self, trial: Trial, by_itself: bool, error: str | None) -> None:
        """Takes down the end of a trial, which came by itself, or to which it was brought."""
        if error:
            trial.end("failed", error)
        else:
            trial.end("finished" if by_itself or trial.epochs >= self.settings.epochs else "stopped early")
        self._journal.put(trial)
        self._tell(trial)

    def _tell(self, trial: Trial, told: bool = False) -> None:
        self._watch(trial, seconds_left(self.trials, self.settings.num_trials, self.slots), told)


def scheduler(settings: SearchConfig, ended: Sequence[Trial] = ()) -> TrialScheduler:
    """ASHA over the epochs, knowing what came of the trials in `ended`; or one that stops none."""
    if not settings.early_stopping:
        return FIFOScheduler()
    # As Tune itself would tell it; it looks at nothing else of a trial, and not at Tune's controller.
    asha: Any = ASHAScheduler(
        time_attr="epoch",
        metric=SCORE,
        mode="max",
        max_t=settings.epochs,
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
    )
    for number, trial in enumerate(ended):  # trials of several searches may have the same name
        stand_in = SimpleNamespace(trial_id=f"{number}/{trial.name}")
        asha.on_trial_add(None, stand_in)
        for row in trial.history:
            value = score(row[OBJECTIVE], trial.gflops, settings)
            asha.on_trial_result(None, stand_in, {"epoch": row["epoch"], SCORE: value})
    return asha


class _Proposer(Searcher):
    """Hands Ray Tune one trial after the other, as many as there is room for, and takes down what comes of them."""

    def __init__(self, known: Known, journal: Journal) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._known, self._journal = known, journal
        self._running: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        """Settings of the next trial; None as long as there is no room, `Searcher.FINISHED` after the last."""
        if len(self._running) >= self._known.slots:
            return None  # asked too early: what is running may teach something
        trial = self._known.next()
        if trial is None:
            return Searcher.FINISHED
        self._running[trial_id] = trial
        return {"trial": trial.name, "values": trial.values, "gflops": trial.gflops}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        # Tune hands nested results on with keys like paths.
        metrics = {key.removeprefix("metrics/"): value for key, value in result.items() if key.startswith("metrics/")}
        if metrics:
            self._known.note(self._running[trial_id], metrics)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        result = result or {}
        self.on_trial_result(trial_id, result)
        trial, problem = self._running.pop(trial_id), result.get("error")
        if error and not problem:
            problem = self._journal.death(trial.name) or f"its process died {MOST_DEATHS} times"
        self._known.end(trial, result.get("ended", False), problem)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """Nothing: the journal has it all."""


def _run(
    driver: TrialDriver,
    settings: SearchConfig,
    known: Known,
    journal: Journal,
    storage_path: str,
    use_gpu: bool,
) -> None:
    """Runs what is left of the trials."""
    _free_trial_resources(storage_path)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(Slot, driver=driver, journal=journal, settings=settings),
        _TrialResources(_bundle(settings, use_gpu), storage_path),
    )
    name = f"tune-{uuid.uuid4().hex[:8]}"
    # No files of Tune's own and of TensorBoard for each result: nobody reads them. And a trial that fails has no score.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    # All processes start at once; by default one is asked for only when the one before is there.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(known.slots)
    ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            num_samples=known.left,
            search_alg=_Proposer(known, journal),
            scheduler=scheduler(settings, [*known.earlier, *known.ended]),
            reuse_actors=True,
        ),
        run_config=ray.tune.RunConfig(
            name=name,
            storage_path=storage_path,
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # drivers have their own
            failure_config=ray.tune.FailureConfig(max_failures=MOST_DEATHS - 1),
            verbose=0,
        ),
    ).fit()


def _bundle(settings: SearchConfig, use_gpu: bool) -> dict[str, float]:
    """What the process of a trial takes; several workers are processes of their own, and take theirs themselves."""
    if settings.workers_per_trial > 1:
        return {"node:__internal_head__": 0.001}  # Ray refuses a bundle of nothing
    return {"CPU": settings.cpus_per_trial} | ({"GPU": 1.0} if use_gpu else {})


class _TrialResources(ray.tune.PlacementGroupFactory):
    """What a trial takes, under a name by which it is found again.

    Ray frees it at the end of the job, not of the process that asked for it: one that was killed and is started again
    in the same job would wait for it for ever.
    """

    def __init__(self, bundle: dict[str, float], search: str) -> None:
        super().__init__([bundle])
        self._search = search

    def to_placement_group(self) -> PlacementGroup:
        return ray.util.placement_group(self.bundles, name=f"{self._search}#{uuid.uuid4().hex}")


def _free_trial_resources(search: str) -> None:
    """Frees what a killed process has left of the search."""
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{search}#") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
