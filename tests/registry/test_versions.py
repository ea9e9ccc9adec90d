"""Versions and aliases in real stores, set by processes that are killed or run at once; the model files are minimal."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from registered_shapes import PROJECT, champion, open_tracker, register_shapes
from sqlalchemy import event
from sqlalchemy.orm import Session

from pipeline.registry.versions import CHALLENGER
from pipeline.tracking.errors import TrackingError, is_transient, retry_transient
from pipeline.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a store for all tests, because creating one takes seconds; each test has its own registered model."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Tracker:
    return open_tracker(folder)


@pytest.fixture
def name() -> str:
    """Name of a registered model that no other test uses."""
    return uuid.uuid4().hex


def test_names_of_classes_that_no_tag_can_hold(tracker: Tracker, name: str) -> None:
    for identity, names in (
        ("few", ["F\xfcchse", "\U0001f98a"]),
        ("many", [f"class {n} \U0001f98a" for n in range(9000)]),
    ):
        version = register_shapes(tracker, name, identity, label_names=names)["version"]
        tag = tracker.client.get_model_version(name, version).tags["label_names"]
        expected = json.dumps(names, ensure_ascii=False)
        assert tag == (expected if identity == "few" else "9000 names, which the metadata of the model have")


def test_a_version_is_decided_anew_for_another_alias(tracker: Tracker, name: str) -> None:
    for identity, hits in (("first", 700), ("second", 650)):
        register_shapes(tracker, name, identity, hits)
    for identity, alias in (("second", "challenger"), ("first", "production")):
        again = register_shapes(tracker, name, identity, alias="production")
        assert (again["alias"], again["champion"]) == (alias, "production")
    aliases = tracker.client.get_registered_model(name).aliases
    assert {name: str(version) for name, version in aliases.items()} == {
        "champion": "1",
        "production": "1",
        CHALLENGER: "2",
    }
    assert register_shapes(tracker, name, "first")["alias"] == "champion"
    # A version that was registered before the tag counts as decided for the alias that is asked for.
    tracker.client.delete_model_version_tag(name, "2", "promotion.alias")
    assert register_shapes(tracker, name, "second", alias="staging")["alias"] == "challenger"


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("case", "alias", "reason"),
    [
        ({"hits": 760}, "champion", "better in 100.0% of 10,000 bootstrap samples of 1000 test rows"),
        ({"hits": 650}, "challenger", "top-1 0.6500 against 0.7000 of version 1: better in 0.0%"),
        ({"hits": 700}, "challenger", "better in 0.0%"),
        ({"hits": 760, "digest": "e" * 64}, "challenger", "tested on other rows"),
        ({"hits": 760, "error": 0.11}, "challenger", "calibration error 0.1100 is above the limit of 0.1"),
        ({"hits": 760, "latency": 101.0}, "challenger", "latency 101.0 ms is above the limit of 100.0 ms"),
    ],
    ids=["better", "worse", "equal", "other data", "badly calibrated", "too slow"],
)
def test_the_second_version_gets_its_alias(
    tracker: Tracker, name: str, case: dict[str, Any], alias: str, reason: str
) -> None:
    first = register_shapes(tracker, name, "first")
    assert (first["version"], first["alias"]) == ("1", "champion")
    assert first["reason"] == "there was no champion, and there has to be one"
    second = register_shapes(tracker, name, "second", **case)
    assert (second["version"], second["alias"]) == ("2", alias)
    assert reason in second["reason"]
    tags = tracker.client.get_model_version(name, "2").tags
    assert (tags["promotion.state"], tags["promotion.reason"]) == (alias, second["reason"])
    aliases = tracker.client.get_registered_model(name).aliases
    expected = {"champion": "2"} if alias == "champion" else {"champion": "1", CHALLENGER: "2"}
    assert {name: str(version) for name, version in aliases.items()} == expected


def test_of_two_processes_at_once_the_best_is_champion(
    folder: Path, tracker: Tracker, name: str, tmp_path: Path
) -> None:
    register_shapes(tracker, name, "first")
    code = """
        import sys, time
        from pathlib import Path
        from pipeline.tracking.errors import retry_transient
        from tests.registry.registered_shapes import open_tracker, register_shapes
        meeting, name, number, hits = Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
        tracker = open_tracker(Path(sys.argv[1]))
        (meeting / f"ready{number}").touch()
        while len(list(meeting.glob("ready*"))) < 2:
            time.sleep(0.001)
        register = lambda: register_shapes(tracker, name, f"at once {number}", hits)
        print(retry_transient(register, tracker.uri, 60)["version"])  # as the pipeline does
    """
    processes = [run_python(code, folder, tmp_path, name, number, hits) for number, hits in enumerate((780, 830))]
    worse, best = (int(process.communicate(timeout=600)[0]) for process in processes)
    assert {worse, best} == {2, 3}
    assert champion(tracker, name) == best
    assert tracker.client.get_model_version(name, str(best)).tags["promotion.state"] == "champion"


@pytest.mark.parametrize(
    ("earlier", "row", "statement", "words"),
    [
        (2, "challenger", "DELETE FROM registered_model_aliases WHERE name = ?", "expected to update 1 row"),
        (
            *(1, "challenger"),
            "INSERT INTO registered_model_aliases (name, alias, version) VALUES (?, 'challenger', 1)",
            "UNIQUE constraint failed",
        ),
        (
            *(1, "promotion.reason"),
            "INSERT INTO model_version_tags (name, version, key, value) VALUES (?, 2, 'promotion.reason', 'other')",
            "UNIQUE constraint failed",
        ),
    ],
    ids=["deletes an alias", "sets an alias", "sets a tag"],
)
def test_a_registration_succeeds_although_another_writer_comes_first(
    folder: Path, tracker: Tracker, name: str, earlier: int, row: str, statement: str, words: str
) -> None:
    """MLflow's store reads the row of an alias or a tag and then writes it. The other writer comes between the two."""
    for version in range(earlier):
        register_shapes(tracker, name, str(version), 700 - version)  # the second is the challenger
    errors: list[TrackingError] = []

    def come_between(session: Session, *_: object) -> None:
        changed = {getattr(entity, "alias", getattr(entity, "key", "")) for entity in (*session.new, *session.dirty)}
        if not errors and row in changed:
            with closing(sqlite3.connect(folder / "mlflow.db")) as other, other:
                other.execute(statement, (name,))

    def register() -> dict[str, str]:
        try:
            return register_shapes(tracker, name, "mine", 760)
        except TrackingError as error:
            errors.append(error)
            raise

    event.listen(Session, "before_flush", come_between)
    try:
        registered = retry_transient(register, tracker.uri, 60)
    finally:
        event.remove(Session, "before_flush", come_between)
    (error,) = errors
    assert words in str(error)
    # The sender repeats a refusal once, which is enough. It must not repeat it for ever, since other records wait.
    assert not is_transient(error)
    assert champion(tracker, name) == int(registered["version"]) == earlier + 1


@pytest.mark.parametrize("moment", ["create_model_version", "set_registered_model_alias", "set_model_version_tag"])
@pytest.mark.parametrize(("mine", "other"), [(780, 830), (830, 780)], ids=["the other is better", "mine is better"])
@pytest.mark.parametrize("first", [True, False], ids=["of all", "after a champion"])
def test_the_best_is_champion_if_another_registers_in_between(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, moment: str, mine: int, other: int, first: bool
) -> None:
    """Another pipeline does its whole registration just before a call that changes something, the worst case."""
    tracker, another = open_tracker(folder), open_tracker(folder)
    if not first:
        register_shapes(tracker, name, "first")
    call: Callable[..., Any] = getattr(tracker.client, moment)
    came: list[str] = []

    def after_another(*args: Any, **kwargs: Any) -> Any:
        if not came and (moment != "set_registered_model_alias" or args[1] == "champion"):
            came.append(moment)
            if moment == "create_model_version":
                another._lock = None  # as with a server; the lock of an SQLite store would block here
            register_shapes(another, name, "other", other)
        return call(*args, **kwargs)

    monkeypatch.setattr(tracker.client, moment, after_another)
    registered = register_shapes(tracker, name, "mine", mine)
    assert came
    between = int(registered["version"]) + (-1 if moment == "create_model_version" else 1)
    assert champion(tracker, name) == (int(registered["version"]) if mine > other else between)


def test_a_killed_registration_is_resumed_to_one_version(folder: Path, tracker: Tracker, name: str) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from tests.registry.registered_shapes import open_tracker, register_shapes
        folder, name, step = sys.argv[1:]
        tracker = open_tracker(Path(folder))
        work = getattr(tracker.client, step)
        def work_and_die(*args, **kwargs):
            work(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(tracker.client, step, work_and_die)
        register_shapes(tracker, name, "once")
    """
    for step in ("log_model_artifacts", "create_model_version", "set_registered_model_alias"):
        process = run_python(code, folder, name, step)
        process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL
    assert "champion" not in tracker.client.get_registered_model(name).aliases
    registered = register_shapes(tracker, name, "once")
    assert registered["uri"] == f"models:/{name}/1"
    assert register_shapes(tracker, name, "once") == registered
    (version,) = tracker.client.search_model_versions(f"name = '{name}'")
    assert champion(tracker, name) == int(version.version) == 1
    assert (version.description, version.tags["dataset.sha256"]) == ("Shapes.", "a" * 64)
    assert json.loads(version.tags["label_names"]) == ["circle", "square"]
    (model,) = tracker.client.search_logged_models([tracker.experiment_id], f"name = '{name}'")
    assert (model.model_id, str(model.status)) == (registered["model_id"], "READY")
    run = tracker.client.get_run(tracker.find_or_create_run("register", f"{name}/once"))
    assert run.outputs
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]


def test_an_abandoned_registration_does_not_block_others(
    tracker: Tracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_shapes(tracker, name, "first")
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "set_registered_model_alias", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            register_shapes(tracker, name, "given up", 780)
    assert register_shapes(tracker, name, "third", 770)["alias"] == CHALLENGER
    assert champion(tracker, name) == 2, "the undecided version is the best"
    assert register_shapes(tracker, name, "fourth", 830)["alias"] == "champion"


def test_an_alias_set_by_hand_is_respected(tracker: Tracker, name: str) -> None:
    for identity, hits in (("first", 700), ("second", 760)):
        register_shapes(tracker, name, identity, hits)
    tracker.client.set_registered_model_alias(name, "champion", "1")
    assert register_shapes(tracker, name, "third", 690)["alias"] == CHALLENGER
    assert champion(tracker, name) == 1
    tracker.client.delete_registered_model_alias(name, "champion")
    assert register_shapes(tracker, name, "fourth", 710)["alias"] == "champion"


def test_a_champion_that_was_registered_by_hand_stays(tracker: Tracker, name: str, tmp_path: Path) -> None:
    tracker.client.create_registered_model(name)
    (tmp_path / "by hand").mkdir()
    tracker.client.create_model_version(name, os.fspath(tmp_path / "by hand"))
    tracker.client.set_registered_model_alias(name, "champion", "1")
    registered = register_shapes(tracker, name, "second", 900)
    assert (registered["alias"], champion(tracker, name)) == (CHALLENGER, 1)
    assert "no test predictions to compare with" in registered["reason"]
