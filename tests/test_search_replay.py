"""The benchmarks that replay searches, on synthetic learning curves with a known outcome."""

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import search_record
import search_replay
import search_surrogate
from search_record import SEARCH, Settings, recipe

from tune.config import SearchConfig
from tune.space import Space

EPOCHS = 9


def made_up(sample: dict[str, Any], epoch: int) -> float:
    """Best at a learning rate of 3e-3, and with many latents."""
    off = math.log10(sample["learning_rate"] / 3e-3)
    return 0.1 * math.exp(-(off**2)) * (1 - 0.5**epoch) + 0.001 * sample["num_latents"]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    settings = Settings(train_rows=500, validation_rows=500, epochs=EPOCHS, global_batch_size=128, seed=0)
    space = Space.of(SEARCH, recipe(settings)[0])
    lines = tmp_path / "curves.jsonl"
    assert search_record.finished_curves(lines, settings) == set()
    with lines.open("a") as file:
        for number in range(60):
            sample = space.draw(random.Random(number))
            epochs = [{"val_accuracy": made_up(sample, e), "seconds": 1.0 + number % 3} for e in range(1, EPOCHS + 1)]
            file.write(json.dumps({"number": number, "sample": sample, "epochs": epochs}) + "\n")
        file.write('{"number": 60, "sam')  # killed
    assert search_record.finished_curves(lines, settings) == set(range(60))
    with pytest.raises(ValueError, match="give another --lines"):
        search_record.finished_curves(lines, replace(settings, seed=1))
    target = tmp_path / "curves.json.gz"
    search_record.pack(lines, target)
    first = target.read_bytes()
    search_record.pack(lines, target)
    assert target.read_bytes() == first
    with gzip.open(target) as packed:
        assert len(json.load(packed)["curves"]) == 60
    return target


def test_asha_stops_what_falls_behind() -> None:
    curves = [search_replay.Curve((level,) * 4, 1.0) for level in (0.5, 0.4, 0.6, 0.45)]
    settings = SearchConfig(epochs=4, grace_epochs=1, reduction_factor=2)
    # 0.45 is below the median of 0.5, 0.4 and 0.6 after one epoch; the first has nothing to be compared with.
    assert search_replay.epochs_until_stopped(curves, settings, slots=1) == [4, 1, 4, 1]
    assert search_replay.epochs_until_stopped(curves[::-1], settings, slots=2) == [4, 4, 1, 2]
    assert search_replay.epochs_until_stopped(curves, replace(settings, early_stopping=False), slots=2) == [4] * 4


def test_a_replay_loses_little_and_saves_much(record: Path) -> None:
    lost, epochs, seconds = search_replay.replay_asha(record, 0, 40, 2, 3, 1)
    assert 0 <= lost < 0.01
    assert 0.2 < epochs < 0.6
    assert 0.2 < seconds < 0.6


def test_the_surrogate_knows_the_curves_and_tpe_finds_their_best(record: Path) -> None:
    assert search_surrogate.cross_validate(record, folds=3)["r2"] > 0.9
    model = search_surrogate.surrogate(record)
    sample = model.space.draw(random.Random(1000))
    assert model.curve(sample)[-1] == pytest.approx(made_up(sample, EPOCHS), abs=0.02)
    settings = replace(SEARCH, num_trials=40, epochs=EPOCHS, num_startup_trials=8)
    best, share = search_replay.search(record, 0, settings, None)
    assert share == 1
    assert best == sorted(best)
    assert best[-1] == pytest.approx(0.116, abs=0.01)
    stopped, share = search_replay.search(record, 0, settings, "stopped early")
    assert share < 0.7
    assert stopped[-1] == pytest.approx(0.116, abs=0.01)
