"""A trial keeps its number, and what ended in an earlier attempt counts, when a search goes on after a kill."""

from typing import Any

from rich.console import Console

from pipeline.driver.trial_table import TrialTable
from pipeline.tasks.events import TrialChanged


def changed(number: int, status: str = "running", epochs: int = 0, best: float | None = None) -> TrialChanged:
    values: dict[str, Any] = {"num_latents": 8}
    return TrialChanged(f"trial-{number:04d}", values, 0.1, status, epochs, best, None, None, None)


def shown(table: TrialTable) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(table.table())
    return captured.get()


def test_a_trial_has_the_number_of_its_name() -> None:
    table = TrialTable(8, 4)
    assert table.update(changed(3)) == "trial 3/8 started: num_latents=8, 0.1 GFLOPs an image"
    assert table.update(changed(6)) == "trial 6/8 started: num_latents=8, 0.1 GFLOPs an image"
    done = table.update(changed(6, "finished", 4, 0.5))
    assert done == "trial 6/8 finished after epoch 4/4, best val_accuracy 0.5000; ? left"


def test_trials_that_ended_in_an_earlier_attempt_are_counted_without_a_line() -> None:
    table = TrialTable(8, 4)
    before = [changed(1, "finished", 4, 0.75), changed(2, "failed"), changed(4, "stopped early", 2, 0.25)]
    assert [table.update(trial) for trial in before] == [None] * 3
    table.update(changed(3))
    assert "search: 3 of 8 trials ended" in shown(table)
    assert "0.7500" in shown(table)
    table.update(changed(3, "finished", 4, 0.5))
    # The process of the search died, and its successor tells of all that have ended.
    assert [table.update(trial) for trial in [*before, changed(3, "finished", 4, 0.5)]] == [None] * 4
    assert "search: 4 of 8 trials ended" in shown(table)
