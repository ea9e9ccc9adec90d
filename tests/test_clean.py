"""Cleaning deletes everything that no version in a real registry needs, and only with `--remove`."""

import contextlib
import hashlib
import io
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.clean import CleanOptions, clean, list_items
from pipeline.storage import Storage

DAYS_AGO = time.time() - 5 * 86400


def key(name: object) -> str:
    """A key such as tasks have."""
    return hashlib.sha256(str(name).encode()).hexdigest()


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
        names = {"ingest": "data", "preprocess": "data", "train": run, "register": run, "report": run}
        keys = {task: key(name) for task, name in names.items()}
        for task, inputs in CHAIN.items():
            home = f"tasks/{task}/{keys[task]}"
            made.write_bytes(f"{home}/attempt-1/file", bytes(1000))
            output = {"tracking_uri": registry, "uri": f"models:/m/{number}"} if task == "register" else {}
            known = {name: keys[name] for name in inputs}
            made.write_json(
                f"{home}/manifest.json", {"task": task, "attempt": "attempt-1", "inputs": known, "output": output}
            )
        made.write_json(f"runs/{key(run)}.json", {"identity": run})
        made.write_bytes(f"tasks/train/{key(run)}/state/checkpoints/1/arrays", bytes(5000))
    made.write_bytes(f"tasks/train/{key('a')}/attempt-0/file", bytes(300))  # from an attempt that was killed
    made.write_bytes(f"tasks/train/{key('c')}/state/checkpoints/1/arrays", bytes(7000))
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
    assert "train 19.6 kB" in text, "two outputs, two states, the killed attempt, the unfinished training"


def test_what_no_version_needs_is_deleted(storage: Storage) -> None:
    size, text = run_clean(storage, remove=True)
    left = files(storage)
    kept = {f"tasks/{task}/{key('data')}" for task in ("ingest", "preprocess")}
    kept |= {f"tasks/{task}/{key('a')}" for task in ("train", "register", "report")}
    expected = {f"{home}/{name}" for home in kept for name in ("manifest.json", "attempt-1/file")}
    assert {path for path in left if path.startswith("tasks/")} == expected
    assert "mlartifacts/1/model" in left, "MLflow's files are not touched"
    assert "removed: " in text
    assert size == pytest.approx(3 * 1000 + 5000 + 5000 + 300 + 7000, abs=1500)  # and three manifests
    assert run_clean(storage)[0] == 0


def test_the_trials_of_a_finished_search_stay(storage: Storage) -> None:
    home = f"tasks/search/{key('a')}"
    storage.write_bytes(f"{home}/state/trials/trial-0001.json", b"{}")
    storage.write_bytes(f"{home}/state/checkpoints/trial-0001/late", bytes(10))
    storage.write_bytes(f"{home}/attempt-0/file", bytes(10))
    storage.write_json(f"{home}/manifest.json", {"task": "search", "attempt": "attempt-1", "inputs": {}, "output": {}})
    train = storage.read_json(f"tasks/train/{key('a')}/manifest.json")
    storage.write_json(
        f"tasks/train/{key('a')}/manifest.json", train | {"inputs": train["inputs"] | {"search": key("a")}}
    )
    run_clean(storage, remove=True, keep_hours=0.0)
    left = {path for path in files(storage) if path.startswith(home)}
    assert left == {f"{home}/manifest.json", f"{home}/state/trials/trial-0001.json"}


def test_what_is_recent_stays(storage: Storage) -> None:
    now = time.time()
    os.utime(Path(storage.uri) / f"tasks/train/{key('c')}/state/checkpoints/1/arrays", (now, now))
    _, text = run_clean(storage, remove=True)
    assert f"tasks/train/{key('c')}/state/checkpoints/1/arrays" in files(storage)
    assert "recent, stays" in text
    run_clean(storage, remove=True, keep_hours=0.0)
    assert not Storage(storage.uri).exists(f"tasks/train/{key('c')}")


def test_a_registry_that_was_recorded_without_its_login_is_asked_for(tmp_path: Path) -> None:
    storage = make_storage(tmp_path / "runs", "postgresql://***@127.0.0.1/mlflow")
    with pytest.raises(
        ValueError, match=r"postgresql://\*\*\*@127.0.0.1/mlflow was recorded without its login: give --tr"
    ):
        list_items(storage)


def test_a_missing_registry_is_an_error(tmp_path: Path, registry: str) -> None:
    storage = make_storage(tmp_path / "runs", f"sqlite:///{tmp_path}/moved.db")
    with pytest.raises(ValueError, match=r"moved.db is not there.*give --tracking-uri"):
        list_items(storage)
    assert not (tmp_path / "moved.db").exists(), "MLflow would have created an empty one"
    assert f"tasks/train/{key('a')}" in {item.path for item in list_items(storage, registry) if item.needed}
    with pytest.raises(ValueError, match="no such folder"):
        clean(CleanOptions(str(tmp_path / "nothing")))


def test_files_of_other_programs_and_what_is_behind_links_stay(storage: Storage, tmp_path: Path) -> None:
    root, other, unneeded = Path(storage.uri), key("other"), key("b")
    foreign = (
        "tasks/2024/thesis/chapter.tex",
        f"tasks/2024/{other}/attempt-1/file",
        "tasks/train/notes/manifest.json",
        f"tasks/train/{other}/homework.txt",
        f"tasks/train/{other[:40]}/attempt-1/file",
    )
    elsewhere = tmp_path / "elsewhere"
    for path in (*(root / name for name in foreign), elsewhere / "attempt-1" / "file", elsewhere / key("d") / "state"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (root / "tasks/evaluate").symlink_to(elsewhere)
    (root / f"tasks/train/{key('linked')}").symlink_to(elsewhere)
    (root / f"tasks/train/{unneeded}/state/linked").symlink_to(elsewhere)
    run_clean(storage, remove=True, keep_hours=0.0)
    left = files(storage)
    assert left.issuperset(foreign)
    assert (elsewhere / "attempt-1" / "file").exists()
    assert (elsewhere / key("d") / "state").exists()
    assert not storage.exists(f"tasks/train/{unneeded}"), "what is ours goes"


@contextlib.contextmanager
def mounted(*options: object) -> Iterator[None]:
    """Mounts something within the block; `options` are those of `mount`, the folder last."""
    made = subprocess.run(["mount", *map(str, options)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(options[-1])], check=True)


def test_what_is_mounted_stays(storage: Storage, tmp_path: Path) -> None:
    root, elsewhere, child = Path(storage.uri), tmp_path / "else where", f"tasks/train/{key('b')}"
    (elsewhere / key("d") / "attempt-1").mkdir(parents=True)
    (elsewhere / key("d") / "attempt-1" / "file").write_text("mine")
    for name in ("tasks/evaluate", f"{child}/state/disk"):
        (root / name).mkdir(parents=True)
    # A part of the same disk, which has the same number of a device, and another file system.
    bind = mounted("--bind", elsewhere, root / "tasks/evaluate")
    with bind, mounted("-t", "tmpfs", "tmpfs", root / child / "state/disk"):
        (root / child / "state/disk/file").write_text("mine")
        before = files(storage)
        _, text = run_clean(storage, remove=True, keep_hours=0.0)
        left = files(storage)
        assert (root / child / "state/disk/file").exists()
    assert (elsewhere / key("d") / "attempt-1" / "file").exists()
    assert {path for path in before if path.startswith(child)} <= left, "a task stays as a whole"
    assert f"tasks/train/{key('c')}/state/checkpoints/1/arrays" not in left
    assert "not touched, because something is mounted there: tasks/evaluate\n" in text
    assert f"{child}/state/disk" in text.replace("\n", "")
    run_clean(storage, remove=True, keep_hours=0.0)
    assert not (root / child).exists(), "it goes when nothing is mounted there"


def test_a_storage_on_a_disk_of_its_own_is_cleaned(registry: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with mounted("-t", "tmpfs", "tmpfs", tmp_path / "runs"):
        storage = make_storage(tmp_path / "runs", registry)
        _, text = run_clean(storage, remove=True, tracking_uri=registry)
        assert "mounted" not in text
        assert not storage.exists(f"tasks/train/{key('c')}")


def test_no_tree_is_deleted_in_which_something_is_mounted(tmp_path: Path) -> None:
    """By whoever deletes: `--force`, a task that removes its earlier attempts, a checkpoint that is not kept."""
    elsewhere, storage = tmp_path / "else where", Storage(str(tmp_path / "runs"))
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    storage.write_bytes("a/b c/own", b"")
    with mounted("--bind", elsewhere, tmp_path / "runs" / "a" / "b c"):
        for path in ("a", "a/b c"):
            with pytest.raises(
                OSError, match=r"is mounted, so what it is in is not deleted: unmount it: .*/runs/a/b c"
            ):
                storage.delete(path)
        storage.delete("a/b c/no such")
        assert (elsewhere / "file").read_text() == "mine"
    storage.delete("a")
    assert not storage.exists("a")


def test_what_cannot_be_deleted_is_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Storage, "delete", refuse)
    with pytest.raises(
        ValueError, match=r"storage = .*: tasks/\w+/\w+.* cannot be deleted .*Permission denied.*do it as"
    ):
        run_clean(storage, remove=True, keep_hours=0.0)


def test_a_folder_in_which_no_run_was_is_refused(storage: Storage) -> None:
    before = files(storage)
    storage.delete("runs")
    with pytest.raises(ValueError, match=r"has no runs/KEY\.json"):
        run_clean(storage, remove=True, keep_hours=0.0)
    assert files(storage) == {path for path in before if not path.startswith("runs/")}


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"{", b'{"task": "train", "attempt": 1, "inputs": {}, "output": {}}']
)
def test_a_manifest_that_is_none_is_named(storage: Storage, content: bytes) -> None:
    path = f"tasks/train/{key('a')}/manifest.json"
    storage.write_bytes(path, content)
    with pytest.raises(ValueError, match=rf"{path} is no manifest of the task train"):
        run_clean(storage, remove=True)


def test_brackets_in_a_path_are_no_markup(tmp_path: Path, registry: str) -> None:
    _, text = run_clean(make_storage(tmp_path / "runs[" / "b]", registry))
    assert "[/b]" in text
