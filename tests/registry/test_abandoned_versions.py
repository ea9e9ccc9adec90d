"""A version whose pipeline was killed and never continued is decided by a later one, from the champion of then on."""

import sqlite3
import uuid
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from registered_shapes import LIMITS, champion, open_tracker, register_shapes

from pipeline.registry.evidence import ROWS_FILE
from pipeline.registry.versions import ABANDONED_SECONDS, CHALLENGER
from pipeline.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Tracker:
    return open_tracker(folder)


@pytest.fixture
def name() -> str:
    """Name of a registered model that no other test uses."""
    return uuid.uuid4().hex


def abandon(
    tracker: Tracker, name: str, hits: int, monkeypatch: pytest.MonkeyPatch, moment: str = "set_registered_model_alias"
) -> None:
    """Registers a version up to `moment`: to the first alias that is set, or to the first tag after the last one."""
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, moment, lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            register_shapes(tracker, name, "abandoned", hits)


def let_time_pass(folder: Path, name: str) -> None:
    """Makes all versions older than the pipeline of an undecided one may be."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        earlier = int(1000 * ABANDONED_SECONDS) + 1000
        store.execute("UPDATE model_versions SET creation_time = creation_time - ? WHERE name = ?", (earlier, name))


def state(tracker: Tracker, name: str, version: int) -> tuple[str, str]:
    tags = tracker.client.get_model_version(name, str(version)).tags
    return tags["promotion.state"], tags.get("promotion.reason", "")


def test_it_is_decided_and_a_choice_by_hand_stays(
    folder: Path, tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_shapes(tracker, name, "first", 700)
    abandon(tracker, name, 650, monkeypatch)
    register_shapes(tracker, name, "third", 760)
    assert state(tracker, name, 2)[0] == "open", "its driver may still go on"
    let_time_pass(folder, name)
    register_shapes(tracker, name, "fourth", 800)
    assert (state(tracker, name, 2)[0], champion(tracker, name)) == (CHALLENGER, 4)
    assert "top-1 0.6500 against 0.8000 of version 4" in state(tracker, name, 2)[1]
    tracker.client.set_registered_model_alias(name, "champion", "3")
    assert register_shapes(tracker, name, "fifth", 740)["alias"] == CHALLENGER
    assert champion(tracker, name) == 3
    again = register_shapes(tracker, name, "abandoned", 650)
    assert (again["version"], again["alias"], again["reason"]) == ("2", *state(tracker, name, 2))


def test_the_next_version_is_compared_with_the_champion_of_then(
    folder: Path, tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the champion of before it was abandoned, the gain of version 3 would not suffice any more."""
    register_shapes(tracker, name, "first", 700)
    abandon(tracker, name, 650, monkeypatch)
    register_shapes(tracker, name, "third", 730)
    let_time_pass(folder, name)
    registered = register_shapes(tracker, name, "fourth", 600, promotion=replace(LIMITS, min_gain=0.05))
    assert (registered["alias"], champion(tracker, name)) == (CHALLENGER, 3)
    assert "against 0.7300 of version 3" in registered["reason"]


def test_the_best_is_champion_also_if_it_was_abandoned(
    folder: Path, tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_shapes(tracker, name, "first", 700)
    abandon(tracker, name, 780, monkeypatch)
    let_time_pass(folder, name)
    assert register_shapes(tracker, name, "third", 770)["alias"] == CHALLENGER
    assert champion(tracker, name) == 2
    decided, reason = state(tracker, name, 2)
    assert (decided, "against 0.7000 of version 1" in reason) == ("champion", True)


def test_one_that_had_the_alias_when_it_was_abandoned_was_the_champion(
    folder: Path, tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_shapes(tracker, name, "first", 700)
    abandon(tracker, name, 780, monkeypatch, "set_model_version_tag")
    assert (champion(tracker, name), state(tracker, name, 2)) == (2, ("open", ""))
    let_time_pass(folder, name)
    registered = register_shapes(tracker, name, "third", 830)
    assert (registered["alias"], "of version 2" in registered["reason"]) == ("champion", True)
    assert state(tracker, name, 2) == ("champion", "it had the alias before")


def test_it_is_decided_without_its_files(
    folder: Path, tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_shapes(tracker, name, "first", 700)
    abandon(tracker, name, 780, monkeypatch)
    let_time_pass(folder, name)
    (Path(str(tracker.client.get_model_version(name, "2").source)) / ROWS_FILE).unlink()
    assert register_shapes(tracker, name, "third", 760)["alias"] == "champion"
    assert state(tracker, name, 2) == (CHALLENGER, f"{ROWS_FILE} is gone")


def test_an_incumbent_that_was_set_by_hand_and_wins_again_keeps_its_own_decision(
    tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_shapes(tracker, name, "first", 700)
    register_shapes(tracker, name, "second", 690)
    before = state(tracker, name, 2)
    tracker.client.set_registered_model_alias(name, "champion", "2")
    abandon(tracker, name, 650, monkeypatch)
    register_shapes(tracker, name, "fourth", 730)
    register_shapes(tracker, name, "fifth", 600, promotion=replace(LIMITS, min_gain=0.08))
    assert (champion(tracker, name), state(tracker, name, 2)) == (2, before)
