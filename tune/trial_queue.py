"""The trials of a search in the order in which they run, and their record in the journal. Needs no Ray."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tune.config import SearchConfig
from tune.journal import Journal, Trial, best_of, seconds_left
from tune.proposals import propose
from tune.space import Space

# Arguments: the trial, the estimated seconds until the search ends (None if unknown), whether a new epoch is complete.
Watch = Callable[[Trial, float | None, bool], None]
Say = Callable[[str], None]


def restart_if_all_failed(journal: Journal, earlier: Sequence[Trial], settings: SearchConfig, say: Say) -> None:
    """Has the trials of a search run again if all have failed and there is no best one.

    They may have failed of something that is remedied since but changes no key, such as a memory limit or a full disk.
    This is decided once, when a search begins: if they fail again, the search ends with an error.
    """
    trials = journal.trials()
    all_failed = bool(trials) and all(trial.status == "failed" for trial in trials)
    if journal.restart_was_cut_off or (all_failed and best_of([*trials, *earlier], settings) is None):
        error = next((f"; the first one: {trial.error}" for trial in trials if trial.error), "")
        say(f"all {len(trials)} trials had failed before and are tried again{error}")
        journal.restart()


class TrialQueue:
    """The trials of a search: first those that were cut off, then new ones. It keeps their record in the journal."""

    def __init__(
        self,
        space: Space,
        settings: SearchConfig,
        journal: Journal,
        earlier: Sequence[Trial],
        preset: Mapping[str, Any] | None,
        concurrent: int,
        watch: Watch,
    ) -> None:
        self.space, self.settings, self.earlier, self.concurrent = space, settings, earlier, concurrent
        self._journal, self._preset, self._watch = journal, preset, watch
        self.trials = journal.trials()
        self._cut_off = [trial for trial in self.trials if trial.status == "running"]
        self._ended_before = self.ended

    @property
    def num_left(self) -> int:
        """Number of trials that are still to be started or continued."""
        return len(self._cut_off) + max(0, self.settings.num_trials - len(self.trials))

    @property
    def ended(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status != "running"]

    def next(self) -> Trial | None:
        """Stores and returns the next trial; None if there is none left."""
        if self._cut_off:
            trial = self._cut_off.pop(0)
            trial.started = time.time()
        else:
            number = len(self.trials)
            if number >= self.settings.num_trials:
                return None
            values = propose(self.space, self.settings, number, self.trials, self._preset, self.earlier)
            if values is None:
                return None
            trial = Trial.of(f"trial-{number + 1:04d}", values, self.space)
            self._journal.write(trial)
            self.trials.append(trial)
        while self._ended_before:
            self._notify(self._ended_before.pop(0))
        self._notify(trial)
        return trial

    def add_epoch(self, trial: Trial, metrics: Mapping[str, Any]) -> None:
        """Records an epoch, unless it is known."""
        if trial.add_epoch(metrics):
            self._notify(trial, new_epoch=True)

    def end(self, trial: Trial, completed: bool, error: str | None) -> None:
        """Records the end of a trial, which `completed` its training, failed with `error`, or was stopped."""
        if error:
            trial.end("failed", self._journal.mask(error))
        else:
            trial.end("finished" if completed or trial.epochs >= self.settings.epochs else "stopped early")
        self._journal.write(trial)
        self._notify(trial)

    def _notify(self, trial: Trial, new_epoch: bool = False) -> None:
        self._watch(trial, seconds_left(self.trials, self.settings.num_trials, self.concurrent), new_epoch)
