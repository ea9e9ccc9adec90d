"""A search whose trials have all failed is tried again when it is called again, since the cause may be remedied."""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from perceiver.config import PerceiverConfig
from pipeline.storage import Storage
from tune.config import SearchConfig
from tune.journal import Journal, Trial
from tune.search import search
from tune.space import DIMENSIONS, Sample, Space
from tune.trial_process import Report
from tune.trial_queue import restart_if_all_failed

CLOSED: dict[str, Any] = dict.fromkeys([d.name for d in DIMENSIONS if d.name != "learning_rate"], ())
ERROR = "MemoryError: the trial's process has 2.00 GiB, search.memory_limit_gib = 1"
# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Training:
    """A `TrainTrial` that notes its calls.

    It fails while the file `broken` is in its folder, and does not end while `endless` is.
    """

    folder: Path

    def __call__(self, sample: Sample, *, trial: str, report: Report) -> None:
        with (self.folder / f"{trial}.log").open("a") as log:
            log.write(f"{sample['learning_rate']}\n")
        if (self.folder / "broken").exists():
            raise OSError("no space left")
        while (self.folder / "endless").exists():
            time.sleep(0.1)
        report({"epoch": 1, "val_accuracy": sample["learning_rate"], "seconds": 0.0})


def run(folder: Path, said: list[str], num_trials: int = 2, **settings: Any) -> dict[str, Any]:
    # One trial at a time, so that a single process is started for both.
    execution = {"max_concurrent_trials": 1} | settings
    config = SearchConfig(**CLOSED, epochs=1, num_trials=num_trials, algorithm="random", **execution)
    space, journal = Space.of(config, PerceiverConfig()), Journal(Storage(str(folder / "state")), "trials")
    training, path = Training(folder), str(folder / "ray")
    return search(training, space, config, journal=journal, storage_path=path, say=said.append)


def calls(folder: Path) -> dict[str, list[str]]:
    """The learning rates with which each trial was called."""
    return {path.stem: path.read_text().split() for path in sorted(folder.glob("*.log"))}


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_that_has_failed_is_tried_again_once_a_call(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "broken").touch()
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match="no trial came as far as one epoch; the first one: OSError: no space"):
            run(tmp_path, said)
        assert [len(rates) for rates in calls(tmp_path).values()] == [attempt] * 2, "a call does not try twice"
    (tmp_path / "broken").unlink()
    found = run(tmp_path, said)
    assert [(t["name"], t["status"], t["error"]) for t in found["trials"]] == [
        ("trial-0001", "finished", None),
        ("trial-0002", "finished", None),
    ]
    for trial in found["trials"]:
        assert calls(tmp_path)[trial["name"]] == [str(trial["values"]["learning_rate"])] * 3, "the same point"
    assert said == ["all 2 trials had failed before and are tried again; the first one: OSError: no space left"] * 2
    assert run(tmp_path, said) == found
    assert len(said) == 2, "a search that has a best trial is not tried again"


@pytest.mark.usefixtures("ray_cluster")
def test_a_higher_memory_limit_helps_a_search_whose_trials_exceeded_it(tmp_path: Path) -> None:
    """The limit is in no key, so that the same search is called with another one."""
    said: list[str] = []
    (tmp_path / "endless").touch()  # otherwise the epoch may be over before the memory is looked at
    with pytest.raises(RuntimeError, match=r"MemoryError: .* search\.memory_limit_gib = 0\.01"):
        run(tmp_path, said, 1, memory_limit_gib=0.01)
    (tmp_path / "endless").unlink()
    found = run(tmp_path, said, 1, memory_limit_gib=8.0)
    assert [trial["status"] for trial in found["trials"]] == ["finished"]
    assert len(said) == 1


class KilledError(Exception):
    """Stands in for the end of the process."""


class MortalStore(Storage):
    """A storage whose process is killed before its change of number `lives`, counted from 0."""

    lives = 10**6

    def write_json(self, path: str, value: Any) -> None:
        self._live()
        super().write_json(path, value)

    def delete(self, path: str) -> None:
        self._live()
        super().delete(path)

    def _live(self) -> None:
        if not self.lives:
            raise KilledError
        self.lives -= 1


def failed_journal(store: Storage, statuses: tuple[Any, ...] = ("failed",) * 3) -> Journal:
    journal = Journal(store, "trials")
    for number, status in enumerate(statuses, 1):
        trial = Trial(f"trial-{number:04d}", {"learning_rate": number / 1000}, 0.1, 10)
        trial.add_epoch({"epoch": 1, "val_accuracy": float("nan")})
        trial.end(status, ERROR if status == "failed" else None)
        journal.write(trial)
        journal.write_death(trial.name, ERROR)
    return journal


def restart(journal: Journal, earlier: tuple[Trial, ...] = ()) -> list[str]:
    said: list[str] = []
    restart_if_all_failed(journal, earlier, SearchConfig(), said.append)
    return said


@pytest.mark.parametrize("lives", range(9))
def test_a_restart_that_is_killed_in_the_middle_is_completed(tmp_path: Path, lives: int) -> None:
    store = MortalStore(str(tmp_path))
    journal = failed_journal(store)
    values = [trial.values for trial in journal.trials()]
    store.lives = lives
    try:
        assert restart(journal) == [f"all 3 trials had failed before and are tried again; the first one: {ERROR}"]
    except KilledError:
        store.lives = 10**6
        assert restart(journal), "the next attempt goes on with it"
    else:
        assert lives == 8, "all places have been tried"
    trials = journal.trials()
    assert [(t.status, t.error, t.history, t.ended) for t in trials] == [("running", None, [], None)] * 3
    assert [t.values for t in trials] == values
    assert [journal.death(t.name) for t in trials] == [None] * 3
    assert restart(journal) == []


def test_a_search_with_a_trial_that_has_not_failed_is_not_restarted(tmp_path: Path) -> None:
    for folder, statuses in (("none", ()), ("running", ("failed", "running")), ("done", ("failed", "finished"))):
        journal = failed_journal(Storage(str(tmp_path / folder)), statuses)
        before = [asdict(trial) for trial in journal.trials()]
        assert restart(journal) == []
        # NaN is not equal to itself.
        assert str([asdict(trial) for trial in journal.trials()]) == str(before)
    journal = failed_journal(Storage(str(tmp_path / "earlier")))
    best = Trial("trial-0001", {"learning_rate": 0.1}, 0.1, 10, "finished", history=[{"epoch": 1, "val_accuracy": 0.5}])
    assert restart(journal, (best,)) == [], "the search has a best trial"
