"""The queue of a search that was cut off tells of the trials that had ended, once there is one to run."""

from pathlib import Path
from typing import Any

from perceiver.config import PerceiverConfig
from pipeline.storage import Storage
from tune.config import SearchConfig
from tune.journal import Journal, Trial
from tune.space import DIMENSIONS, Space
from tune.trial_queue import TrialQueue

CLOSED: dict[str, Any] = dict.fromkeys([d.name for d in DIMENSIONS if d.name != "learning_rate"], ())


def test_trials_that_ended_before_are_told_with_the_first_one_that_runs(tmp_path: Path) -> None:
    settings = SearchConfig(**CLOSED, num_trials=5, algorithm="random")
    journal, told = Journal(Storage(str(tmp_path)), "trials"), []
    statuses: tuple[Any, ...] = ("finished", "running", "failed", "stopped early")
    for number, status in enumerate(statuses, 1):
        journal.write(Trial(f"trial-{number:04d}", {"learning_rate": number / 1000}, 0.1, 10, status))
    space = Space.of(settings, PerceiverConfig())
    queue = TrialQueue(
        space, settings, journal, [], None, 1, lambda trial, left, new: told.append((trial.name[-1], trial.status, new))
    )
    assert told == [], "whoever waits for the first trial to start is not to take these for it"
    names = []
    while trial := queue.next():
        names.append(trial.name)
    assert names == ["trial-0002", "trial-0005"]
    assert told == [
        ("1", "finished", False),
        ("3", "failed", False),
        ("4", "stopped early", False),
        ("2", "running", False),
        ("5", "running", False),
    ]
