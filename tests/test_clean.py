"""Cleaning deletes everything that no version in a real registry needs, and only with `--remove`."""

import io
import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.clean import CleanOptions, clean, list_items
from pipeline.storage import Storage

DAYS_AGO = time.time() - 5 * 86400
CHAIN = {
    "ingest": (),
    "preprocess": ("ingest",),
    "train": ("preprocess",),
    "register": ("preprocess", "train"),
    "report": ("register",),
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a registry with version 1 of the model `m`; version 2 was deleted."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("m")
    for _ in range(2):
        client.create_model_version("m", source=str(folder))
    client.delete_model_version("m", "2")
    return uri


def make_storage(folder: Path, registry: str) -> Storage:
    """Run `a` registered version 1, run `b` version 2 on the same data; the training of `c` was interrupted."""
    made = Storage(str(folder))
    for run, number in (("a", 1), ("b", 2)):
        keys = {"ingest": "data", "preprocess": "data", "train": run, "register": run, "report": run}
        for task, inputs in CHAIN.items():
            home = f"tasks/{task}/{keys[task]}"
            made.write_bytes(f"{home}/attempt-1/file", bytes(1000))
            output = {"tracking_uri": registry, "uri": f"models:/m/{number}"} if task == "register" else {}
            known = {name: keys[name] for name in inputs}
            made.write_json(
                f"{home}/manifest.json", {"task": task, "attempt": "attempt-1", "inputs": known, "output": output}
            )
        made.write_bytes(f"tasks/train/{run}/state/checkpoints/1/arrays", bytes(5000))
    made.write_bytes("tasks/train/a/attempt-0/file", bytes(300))  # from an attempt that was killed
    made.write_bytes("tasks/train/c/state/checkpoints/1/arrays", bytes(7000))
    made.write_bytes("mlartifacts/1/model", bytes(10))
    for path in folder.rglob("*"):
        os.utime(path, (DAYS_AGO, DAYS_AGO))
    return made


@pytest.fixture
def storage(tmp_path: Path, registry: str) -> Storage:
    return make_storage(tmp_path / "runs", registry)


def files(storage: Storage) -> set[str]:
    root = Path(storage.uri)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def run_clean(storage: Storage, **options: object) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=160)
    size = clean(CleanOptions(storage.uri, **options), console)  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return size, console.file.getvalue()


def test_nothing_is_deleted_without_the_flag(storage: Storage) -> None:
    before = files(storage)
    size, text = run_clean(storage)
    assert files(storage) == before
    assert size > 12_000
    assert "would be removed" in text
    assert "5 days ago" in text
    assert "train 19.5 kB" in text, "two outputs, two states, the killed attempt, the unfinished training"


def test_what_no_version_needs_is_deleted(storage: Storage) -> None:
    size, text = run_clean(storage, remove=True)
    left = files(storage)
    kept = {f"tasks/{task}/data" for task in ("ingest", "preprocess")}
    kept |= {f"tasks/{task}/a" for task in ("train", "register", "report")}
    expected = {f"{home}/{name}" for home in kept for name in ("manifest.json", "attempt-1/file")}
    assert {path for path in left if path.startswith("tasks/")} == expected
    assert "mlartifacts/1/model" in left, "MLflow's files are not touched"
    assert "removed: " in text
    assert size == pytest.approx(3 * 1000 + 5000 + 5000 + 300 + 7000, abs=1500)  # and three manifests
    assert run_clean(storage)[0] == 0


def test_the_trials_of_a_finished_search_stay(storage: Storage) -> None:
    home = "tasks/search/a"
    storage.write_bytes(f"{home}/state/trials/trial-0001.json", b"{}")
    storage.write_bytes(f"{home}/state/checkpoints/trial-0001/late", bytes(10))
    storage.write_bytes(f"{home}/attempt-0/file", bytes(10))
    storage.write_json(f"{home}/manifest.json", {"task": "search", "attempt": "attempt-1", "inputs": {}, "output": {}})
    train = storage.read_json("tasks/train/a/manifest.json")
    storage.write_json("tasks/train/a/manifest.json", train | {"inputs": train["inputs"] | {"search": "a"}})
    run_clean(storage, remove=True, keep_hours=0.0)
    left = {path for path in files(storage) if path.startswith(home)}
    assert left == {f"{home}/manifest.json", f"{home}/state/trials/trial-0001.json"}


def test_what_is_recent_stays(storage: Storage) -> None:
    now = time.time()
    os.utime(Path(storage.uri) / "tasks/train/c/state/checkpoints/1/arrays", (now, now))
    _, text = run_clean(storage, remove=True)
    assert "tasks/train/c/state/checkpoints/1/arrays" in files(storage)
    assert "recent, stays" in text
    run_clean(storage, remove=True, keep_hours=0.0)
    assert not Storage(storage.uri).exists("tasks/train/c")


def test_a_missing_registry_is_an_error(tmp_path: Path, registry: str) -> None:
    storage = make_storage(tmp_path / "runs", f"sqlite:///{tmp_path}/moved.db")
    with pytest.raises(ValueError, match=r"moved.db is not there.*give --tracking-uri"):
        list_items(storage)
    assert not (tmp_path / "moved.db").exists(), "MLflow would have created an empty one"
    assert "tasks/train/a" in {item.path for item in list_items(storage, registry) if item.needed}
    with pytest.raises(ValueError, match="no such folder"):
        clean(CleanOptions(str(tmp_path / "nothing")))
