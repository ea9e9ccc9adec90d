"""A registry is asked whether it still has what it was given: versions and files that are gone since."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from registered_shapes import champion, open_tracker, register_shapes

from pipeline.registry.evidence import ROWS_FILE
from pipeline.registry.fetch import fetch, is_registered, registered_uris, resolve
from pipeline.registry.tags import EVIDENCE
from pipeline.registry.versions import RETRAIN_FILE
from pipeline.settings.presets import quickstart
from pipeline.tasks.steps import check_initial_model
from pipeline.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Tracker:
    return open_tracker(folder)


def files(tracker: Tracker, name: str, version: str) -> Path:
    return Path(str(tracker.client.get_model_version(name, version).source))


def test_a_version_that_was_deleted_is_registered_again(tracker: Tracker) -> None:
    uri = register_shapes(tracker, "deleted", "run")["uri"]
    assert is_registered(uri, tracker.uri)
    tracker.client.delete_registered_model("deleted")
    assert not is_registered(uri, tracker.uri)
    assert register_shapes(tracker, "deleted", "run")["uri"] == uri
    assert is_registered(uri, tracker.uri)
    assert champion(tracker, "deleted") == 1


def test_files_that_are_gone_are_written_again(tracker: Tracker, tmp_path: Path) -> None:
    uri = register_shapes(tracker, "emptied", "run")["uri"]
    shutil.rmtree(files(tracker, "emptied", "1"))
    assert not is_registered(uri, tracker.uri)
    with pytest.raises(ValueError, match="model = 'models:/emptied/1': its files cannot be read from"):
        fetch(uri, tracker.uri, tmp_path)
    assert register_shapes(tracker, "emptied", "run")["uri"] == uri
    assert is_registered(uri, tracker.uri)


def test_initial_weights_are_looked_for_before_anything_starts(tracker: Tracker) -> None:
    uri = register_shapes(tracker, "initial", "run")["uri"]
    weights = files(tracker, "initial", "1") / RETRAIN_FILE
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"weights")

    def check(initial: str, store: str = tracker.uri) -> None:
        config = quickstart()
        config = replace(
            config,
            search=replace(config.search, num_trials=0),
            tracking=replace(config.tracking, uri=store),
            train=replace(config.train, initial_model=initial),
        )
        check_initial_model(config)

    check(uri)
    with pytest.raises(ValueError, match=r"model = 'models:/initial/2': it is not in sqlite"):
        check("models:/initial/2")
    with pytest.raises(ValueError, match=r"model = 'models:/nothing/1': it is not in sqlite"):
        check("models:/nothing/1")
    with pytest.raises(ValueError, match=r"model = 'models:/initial/1': .*none.db is not there: give"):
        check(uri, f"{tracker.uri}.none.db")
    weights.unlink()
    with pytest.raises(ValueError, match=r"model = 'models:/initial/1' has no file retrain/model.keras: it was not"):
        check(uri)
    shutil.rmtree(files(tracker, "initial", "1"))
    with pytest.raises(ValueError, match=r"model = 'models:/initial/1' has no file retrain/model.keras|cannot be read"):
        check(uri)


def test_a_registry_that_is_gone_or_does_not_answer(tracker: Tracker, folder: Path, tmp_path: Path) -> None:
    assert not is_registered("models:/m/1", f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    assert is_registered("models:/m/1", "http://127.0.0.1:9"), "no reason to register again"


@pytest.mark.parametrize("damage", ["gone", "cannot be read"])
def test_a_champion_without_its_files_has_no_test_predictions(tracker: Tracker, damage: str) -> None:
    name = f"champion {damage}"
    register_shapes(tracker, name, "first", 700)
    if damage == "gone":
        shutil.rmtree(files(tracker, name, "1"))
    else:
        (files(tracker, name, "1") / ROWS_FILE).write_bytes(b"PK\3\4 and no more")
    second = register_shapes(tracker, name, "second", 760)
    assert second["alias"] == "challenger"
    assert second["reason"] == "version 1, the champion, has no test predictions to compare with"
    assert champion(tracker, name) == 1
    assert damage in tracker.client.get_model_version(name, "1").tags[EVIDENCE]
    assert EVIDENCE not in tracker.client.get_model_version(name, "2").tags


def test_a_registry_that_is_not_there_is_named_with_the_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in a URI of three slashes is seen from the current folder, which may be another one."""
    monkeypatch.chdir(tmp_path)
    uri = "sqlite:///runs/mlflow.db"
    message = rf"tracking-uri = {uri}: {tmp_path}/runs/mlflow.db is not there: give --tracking-uri the URI of the"
    with pytest.raises(ValueError, match=f"^{message}"):
        registered_uris(uri)
    with pytest.raises(ValueError, match=f"^model = 'models:/m/1': {message}"):
        resolve("models:/m/1", uri)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    with pytest.raises(ValueError, match=r"runs/mlflow.db is no database of MLflow"):
        registered_uris(uri)
