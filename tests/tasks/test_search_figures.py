"""A figure of the search that cannot be drawn is a line in the log: the trials are trained, and the task goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from perceiver.config import PerceiverConfig
from pipeline.storage import Storage
from pipeline.tasks.events import Said
from pipeline.tasks.search import _figures
from tune.config import SearchConfig
from tune.journal import Trial
from tune.space import DIMENSIONS, Space


def test_a_figure_that_cannot_be_drawn_is_a_line_in_the_log(tmp_path: Path) -> None:
    closed: dict[str, Any] = {d.name: () for d in DIMENSIONS if d.name != "learning_rate"}
    settings = SearchConfig(**closed)
    trials = []
    for number in range(4):
        trial = Trial(f"trial-{number:04d}", {"learning_rate": 1e-3}, 0.1, 10)
        trial.add_epoch({"epoch": 1, "val_accuracy": 0.5 + 0.01 * number})
        trial.end("finished")
        trials.append(trial)
    said: list[object] = []
    context: Any = SimpleNamespace(
        config=SimpleNamespace(search=settings),
        storage=Storage(str(tmp_path)),
        out="out",
        channel=SimpleNamespace(report=said.append),
    )
    assert _figures(context, Space.of(settings, PerceiverConfig()), trials) == ["out/figures/search.html"]
    (line,) = said
    assert isinstance(line, Said)
    assert (line.task, line.text[:47]) == ("search", "warning: the figure of the importances cannot b")
