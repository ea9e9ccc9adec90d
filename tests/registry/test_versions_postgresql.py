"""A tracking server on PostgreSQL with its own artifact store, as used by a cluster of several hosts."""

import importlib.util
import math
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_versions import PROJECT, champion, register_shapes
from tracking_server import TrackingServer, free_port, kill

from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow  # a database, a server and two processes


def binaries() -> Path | None:
    """Folder with `initdb` and `postgres`: from the package pgserver, from Debian, or on the path."""
    found = importlib.util.find_spec("pgserver")
    places = [Path(str(found.origin)).parent / "pginstall" / "bin"] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places += [Path(path).parent for path in [shutil.which("initdb")] if path]
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URI of a PostgreSQL server on loopback."""
    place = binaries()
    if place is None:
        pytest.skip("no PostgreSQL here: pip install pgserver, or apt-get install postgresql")
    # PostgreSQL refuses to run as root, and pytest's folders are root's alone.
    user = next((name for name in ("postgres", "nobody") if _exists(name)), None) if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port = free_port()
    try:
        made = subprocess.run(
            [place / "initdb", "--pgdata", folder / "data", "--username", "mlflow", "--auth", "trust", "--no-sync"],
            user=user,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        options = ["-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories="]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [str(place / "postgres"), *options], user=user, stdout=log, stderr=log, start_new_session=True
            )
        try:
            while "ready to accept connections" not in (folder / "log").read_text():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            kill(process)
    finally:
        shutil.rmtree(folder)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    made = TrackingServer(tmp_path_factory.mktemp("server"), database)
    yield made
    made.kill()


def test_runs_are_recorded_once(server: TrackingServer) -> None:
    tracker = Tracker(server.uri, "shapes")
    run_id = tracker.find_or_create_run("pipeline", "remote")
    assert Tracker(server.uri, "shapes").find_or_create_run("pipeline", "remote") == run_id
    for _ in range(2):
        tracker.log_params(run_id, {"train.epochs": 2})
        tracker.log_history(run_id, [{"epoch": 1, "loss": math.nan}, {"epoch": 2, "loss": 1.0}])
        tracker.log_metrics(run_id, {"test_top1": math.nan})
        tracker.log_text(run_id, "hello", "note.txt")
    assert [metric.step for metric in tracker.client.get_metric_history(run_id, "loss")] == [1, 2]
    assert len(tracker.client.get_metric_history(run_id, "test_top1")) == 1
    (note,) = (server.folder / "files").rglob("note.txt")
    assert note.read_text() == "hello"


def test_of_two_processes_at_once_the_best_is_champion(server: TrackingServer, tmp_path: Path) -> None:
    """Unlike an SQLite store, a server has no lock that makes one process wait for the other."""
    tracker = Tracker(server.uri, "shapes")
    register_shapes(tracker, "shapes", "first")
    code = """
        import sys, time
        from pathlib import Path
        sys.path.append("tests/registry")
        from test_versions import register_shapes
        from pipeline.tracking.tracker import Tracker
        uri, meeting, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
        tracker = Tracker(uri, "shapes")
        for turn in range(3):
            (meeting / f"{turn}.{number}").touch()
            while len(list(meeting.glob(f"{turn}.*"))) < 2:
                time.sleep(0.001)
            hits = 780 + 60 * turn + (40 if number == "best" else 0)
            print(register_shapes(tracker, "shapes", f"{turn}.{number}", hits)["version"])
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), server.uri, str(tmp_path), number],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in ("second", "best")
    ]
    second, best = (list(map(int, process.communicate(timeout=120)[0].split())) for process in processes)
    assert sorted(second + best) == list(range(2, 8))
    assert champion(tracker, "shapes") == best[-1]
    versions = {int(version.version): version for version in tracker.client.search_model_versions("name = 'shapes'")}
    assert all(versions[number].tags["promotion.state"] == "champion" for number in best)
    assert all(str(version.source).startswith("mlflow-artifacts:") for version in versions.values())
