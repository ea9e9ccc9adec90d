"""Cleaning deletes everything that no version in a real registry needs, and only with `--remove`."""

import contextlib
import hashlib
import io
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.clean import CleanOptions, clean
from pipeline.driver.drive import execute
from pipeline.registry.fetch import registered_uris
from pipeline.settings.command_line import parse
from pipeline.settings.config import PipelineConfig
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.lease import Claim, Lease, LeaseLost
from pipeline.workflow.run import Run, recorded_keys

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


def one_line(text: str) -> str:
    """What a console has broken into lines."""
    return " ".join(text.split())


def is_there(storage: Storage, run: str) -> bool:
    return storage.exists(f"tasks/register/{key(run)}/manifest.json")


def assert_runs_are_kept(storage: Storage, *runs: str) -> None:
    """Checks that these runs of `make_storage` are complete, with the data that they read."""
    homes = [f"tasks/{task}/{key('data')}" for task in ("ingest", "preprocess")]
    homes += [f"tasks/{task}/{key(run)}" for run in runs for task in ("train", "register", "report")]
    expected = {f"{home}/{name}" for home in homes for name in ("manifest.json", "attempt-1/file")}
    assert expected <= files(storage)


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


def make_interrupted(folder: Path, hours: float, recorded: bool = True) -> Run[PipelineConfig]:
    """A run with data and a search of five days ago, whose training was interrupted `hours` ago."""
    config = parse(["quickstart", "--storage", str(folder)])[1].config
    run = Run(TASKS, config, Storage(config.storage))
    for task in run.tasks[:3]:
        run.storage.write_bytes(f"{run.home(task.name)}/attempt-1/file", bytes(1000))
        inputs = {name: run.keys[name] for name in task.inputs}
        manifest = {"task": task.name, "attempt": "attempt-1", "inputs": inputs, "output": {}}
        run.storage.write_json(run.manifest_path(task.name), manifest)
    run.storage.write_bytes(f"{run.home('search')}/state/checkpoints/1", bytes(10))
    run.storage.write_bytes(f"{run.home('train')}/state/checkpoints/1", bytes(1000))
    run.identity()
    if not recorded:
        run.storage.delete(f"runs/{run.key}.tasks.json")
    for path in folder.rglob("*"):
        os.utime(path, (DAYS_AGO, DAYS_AGO))
    written = time.time() - hours * 3600
    os.utime(folder / run.home("train") / "state/checkpoints/1", (written, written))
    return run


def outputs(run: Run[PipelineConfig]) -> set[str]:
    """The tasks of an interrupted run whose outputs are there, complete."""
    done = {task.name for task in run.tasks if run.storage.exists(run.manifest_path(task.name))}
    return {name for name in done if run.storage.exists(f"{run.home(name)}/attempt-1/file")}


def wait_for(key: str, claim: Claim) -> None:
    raise AssertionError(f"waits for {claim} of {key}")


def test_what_a_recent_result_was_made_from_stays(storage: Storage) -> None:
    now = time.time()
    os.utime(Path(storage.uri) / f"tasks/train/{key('b')}/manifest.json", (now, now))
    for task in ("ingest", "preprocess"):  # of a version of its own, so that nothing else needs them
        old, new = f"tasks/{task}/{key('data')}", f"tasks/{task}/{key('a')}"
        (Path(storage.uri) / old).rename(Path(storage.uri) / new)
    for path in (f"tasks/train/{key('b')}/manifest.json", f"tasks/preprocess/{key('a')}/manifest.json"):
        manifest = storage.read_json(path)
        storage.write_json(path, manifest | {"inputs": dict.fromkeys(manifest["inputs"], key("a"))})
    os.utime(Path(storage.uri) / f"tasks/preprocess/{key('a')}/manifest.json", (DAYS_AGO, DAYS_AGO))
    run_clean(storage, remove=True)
    left = files(storage)
    for home in (f"ingest/{key('a')}", f"preprocess/{key('a')}", f"train/{key('b')}"):
        assert {f"tasks/{home}/manifest.json", f"tasks/{home}/attempt-1/file"} <= left
    assert not storage.exists(f"tasks/report/{key('b')}"), "what only follows from it is not needed"
    run_clean(storage, remove=True, keep_hours=0.0)
    assert not any(
        f"/{name}/" in path for path in files(storage) for name in (f"ingest/{key('a')}", f"train/{key('b')}")
    )


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier version"])
def test_what_a_training_reads_that_was_interrupted_recently_stays(tmp_path: Path, recorded: bool) -> None:
    run = make_interrupted(tmp_path / "runs", 2.0, recorded)
    _, text = run_clean(run.storage, remove=True)
    assert outputs(run) == {"ingest", "preprocess", "search"}
    assert run.storage.exists(f"{run.home('train')}/state/checkpoints/1")
    assert not run.storage.exists(f"{run.home('search')}/state"), "a finished search does not go on from it"
    assert ("has left no record of what it reads: clean later" in one_line(text)) == (not recorded)
    run_clean(run.storage, remove=True, keep_hours=1.0)
    assert not any(path.startswith("tasks/") for path in files(run.storage))


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier version"])
def test_a_run_at_which_a_driver_works_stays(tmp_path: Path, recorded: bool) -> None:
    """Though everything in it is old, and though the driver claims no key of the data."""
    run = make_interrupted(tmp_path / "runs", 100.0, recorded)
    other = f"tasks/train/{key('other')}"
    run.storage.write_bytes(f"{other}/state/checkpoints/1", bytes(10))
    os.utime(Path(run.storage.fs_path(f"{other}/state/checkpoints/1")), (DAYS_AGO, DAYS_AGO))
    before = {path for path in files(run.storage) if path.startswith("tasks/")}
    with Lease(run.storage, [run.key, run.keys["train"]], wait_for):
        _, text = run_clean(run.storage, remove=True, keep_hours=0.0)
    gone = before - files(run.storage)
    if recorded:
        assert gone == {f"{other}/state/checkpoints/1"}
    else:
        assert gone == {f"{run.home('search')}/state/checkpoints/1"}, "as of every finished task"
        assert "has left no record of what it reads" in one_line(text)
    assert f"the run of process {os.getpid()} on " in text
    assert "stays, because that is at work" in one_line(text)
    run_clean(run.storage, remove=True)
    assert not any(path.startswith("tasks/") for path in files(run.storage)), "the driver has ended"


def test_a_driver_says_what_its_run_has_before_it_claims_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its claim would keep all tasks of all runs for a moment, or nothing."""
    preset, options = parse(["quickstart", "--storage", str(tmp_path / "runs")])
    run = Run(TASKS, options.config, Storage(options.config.storage))
    found: list[dict[str, dict[str, str]]] = []

    def enter(_: Lease) -> None:
        found.append(recorded_keys(run.storage))
        raise LeaseLost("the test ends here")

    monkeypatch.setattr(Lease, "__enter__", enter)
    with pytest.raises(LeaseLost):
        execute(preset, options, run)
    assert found == [{run.key: run.keys}]


def test_what_a_claim_keeps_whose_driver_may_be_dead_is_said(tmp_path: Path) -> None:
    run = make_interrupted(tmp_path / "runs", 100.0)
    claims = {
        "ended": asdict(replace(Claim.of_this_process(), born="0")),
        "silent": asdict(replace(Claim.of_this_process(), machine="another", host="far")),
        "damaged": {"host": "far"},
    }
    remedies = {
        "ended": "stays, though that has ended: give its command again, or delete ",
        "silent": "on far stays, though that gave its last sign of life 5 days ago: if it has ended, give its command "
        "again, or delete ",
        "damaged": "damaged.json is no claim of a driver: delete it",
    }
    for name, claim in claims.items():
        path = f"drivers/{run.key}/{name}.json"
        run.storage.write_json(path, claim)
        os.utime(Path(run.storage.fs_path(path)), (DAYS_AGO, DAYS_AGO))
        before = files(run.storage)
        _, text = run_clean(run.storage, remove=True)
        assert files(run.storage) == before
        assert remedies[name] in one_line(text)
        assert f"drivers/*/{name}.json" in "".join(text.split())
        run.storage.delete(path)
    run_clean(run.storage, remove=True)
    assert not outputs(run)


def test_nothing_more_is_deleted_when_a_run_begins_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_interrupted(tmp_path / "runs", 100.0)
    delete, deleted = Storage.delete, []

    def begin(storage: Storage, path: str) -> None:
        delete(storage, path)
        deleted.append(path)
        storage.write_json(f"drivers/{run.key}/new.json", asdict(Claim.of_this_process()))

    monkeypatch.setattr(Storage, "delete", begin)
    with pytest.raises(ValueError, match="a run has begun meanwhile"):
        run_clean(run.storage, remove=True)
    assert {path.split("/")[1] for path in deleted} == {"ingest"}
    assert outputs(run) == {"preprocess", "search"}


def test_what_is_made_from_the_rest_stays_behind_a_link(tmp_path: Path) -> None:
    """Such as data that was moved to a larger disk; what it was made from stays with it."""
    run = make_interrupted(tmp_path / "runs", 100.0)
    (tmp_path / "runs/tasks/preprocess").rename(tmp_path / "larger disk")
    (tmp_path / "runs/tasks/preprocess").symlink_to(tmp_path / "larger disk")
    run_clean(run.storage, remove=True)
    assert outputs(run) == {"ingest", "preprocess"}


def test_a_version_in_a_registry_that_was_recorded_without_its_login_stays(tmp_path: Path) -> None:
    storage = make_storage(tmp_path / "runs", "postgresql://***@127.0.0.1/mlflow")
    _, text = run_clean(storage, remove=True)
    assert_runs_are_kept(storage, "a", "b")
    note = "the registry postgresql://***@127.0.0.1/mlflow was recorded without its login: give --tracking-uri"
    assert text.count(note) == 1
    assert not storage.exists(f"tasks/train/{key('c')}"), "what no registration needs goes all the same"


def test_a_version_in_a_registry_that_is_not_there_stays(tmp_path: Path, registry: str) -> None:
    recorded = f"sqlite:///{tmp_path}/moved.db"
    storage = make_storage(tmp_path / "runs", recorded)
    for options in ({}, {"tracking_uri": registry}):
        _, text = run_clean(storage, remove=True, **options)
        assert_runs_are_kept(storage, "a", "b")
        assert f"moved.db is not there: if it has moved, give --tracking-uri and --moved-from {recorded}" in one_line(
            text
        )
        assert ("--tracking-uri was not used" in text) == bool(options)
    assert not (tmp_path / "moved.db").exists(), "MLflow would have created an empty one"
    run_clean(storage, remove=True, tracking_uri=registry, moved_from=recorded)
    assert_runs_are_kept(storage, "a")
    assert not storage.exists(f"tasks/train/{key('b')}"), "its version was deleted from the registry that has moved"


def test_what_cannot_be_used_is_an_error(tmp_path: Path, storage: Storage, registry: str) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        clean(CleanOptions(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"moved_from = .*: give --tracking-uri"):
        CleanOptions(moved_from=registry)
    absent = f"sqlite:///{tmp_path}/absent.db"
    with pytest.raises(ValueError, match=r"absent\.db is not there"):
        run_clean(storage, tracking_uri=absent, moved_from=registry)


def test_the_uri_of_one_registry_says_nothing_about_the_versions_in_others(tmp_path: Path, storage: Storage) -> None:
    another = f"sqlite:///{tmp_path}/another.db"
    client = MlflowClient(tracking_uri=another, registry_uri=another)
    client.create_registered_model("m")  # it has no version 1
    for run in ("here", "there"):
        output = {"tracking_uri": another if run == "there" else "https://***@mlflow.corp", "uri": "models:/m/1"}
        path = f"tasks/register/{key(run)}/manifest.json"
        storage.write_json(path, {"task": "register", "attempt": "attempt-1", "inputs": {}, "output": output})
        os.utime(Path(storage.uri) / path, (DAYS_AGO, DAYS_AGO))
    run_clean(storage, remove=True, tracking_uri=another)
    assert_runs_are_kept(storage, "a")
    assert [is_there(storage, run) for run in ("here", "there")] == [True, False]


def test_each_version_is_looked_up_in_the_registry_that_its_run_recorded(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--tracking-uri` gives the login of one registry, and says nothing about the others."""
    asked = []

    def versions(uri: str) -> set[str]:
        asked.append(uri)
        return {"models:/other/1"}

    monkeypatch.setattr("pipeline.kept.check_server", lambda uri: None)
    monkeypatch.setattr(
        "pipeline.kept.registered_uris", lambda uri: versions(uri) if "corp" in uri else registered_uris(uri)
    )
    for run, number, recorded in (
        ("masked", 1, "https://***@mlflow.corp"),
        ("unmasked", 1, "https://mlflow.corp/"),
        ("nowhere", 1, None),
        ("deleted", 2, "https://***@mlflow.corp"),
        ("elsewhere", 2, "https://***@another.corp"),
    ):
        output = {"tracking_uri": recorded, "uri": f"models:/other/{number}"}
        path = f"tasks/register/{key(run)}/manifest.json"
        storage.write_json(path, {"task": "register", "attempt": "attempt-1", "inputs": {}, "output": output})
        os.utime(Path(storage.uri) / path, (DAYS_AGO, DAYS_AGO))
    _, text = run_clean(storage, remove=True, tracking_uri="https://user:password@mlflow.corp")
    assert_runs_are_kept(storage, "a")
    assert set(asked) == {"https://user:password@mlflow.corp"}
    left = {run for run in ("masked", "unmasked", "nowhere", "deleted", "elsewhere") if is_there(storage, run)}
    assert left == {"masked", "unmasked", "nowhere", "elsewhere"}
    assert text.count("another.corp was recorded without its login: give --tracking-uri") == 1
    assert "password" not in text


def test_a_version_in_a_registry_that_does_not_answer_stays(tmp_path: Path) -> None:
    """A server that is down, a database without its driver, an URI that is none, and a file that is no database."""
    (tmp_path / "damaged.db").write_bytes(b"no database" * 100)
    registries = (
        "http://127.0.0.1:9",
        "mssql+nothing://127.0.0.1:9/m",
        "file:///m",
        f"sqlite:///{tmp_path}/damaged.db",
    )
    for number, uri in enumerate(registries):
        storage = make_storage(tmp_path / f"runs{number}", uri)
        _, text = run_clean(storage, remove=True)
        assert_runs_are_kept(storage, "a", "b")
        assert f"what its versions need stays, because the registry {uri} cannot be asked: " in one_line(text)


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
