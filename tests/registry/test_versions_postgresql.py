"""A tracking server on PostgreSQL with its own artifact store, as used by a cluster of several hosts."""

import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgresql_server import postgresql
from registered_shapes import PROJECT, champion, register_shapes
from tracking_server import TrackingServer

from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow  # a database, a server and two processes


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URI of a PostgreSQL server on loopback."""
    with postgresql() as uri:
        yield uri


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
        from registered_shapes import register_shapes
        from pipeline.tracking.errors import retry_transient
        from pipeline.tracking.tracker import Tracker
        uri, meeting, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
        tracker = Tracker(uri, "shapes")
        for turn in range(3):
            (meeting / f"{turn}.{number}").touch()
            while len(list(meeting.glob(f"{turn}.*"))) < 2:
                time.sleep(0.001)
            hits = 780 + 60 * turn + (40 if number == "best" else 0)
            register = lambda: register_shapes(tracker, "shapes", f"{turn}.{number}", hits)
            print(retry_transient(register, uri, 60)["version"])  # as the pipeline does
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
    second, best = (list(map(int, process.communicate(timeout=600)[0].split())) for process in processes)
    assert sorted(second + best) == list(range(2, 8))
    assert champion(tracker, "shapes") == best[-1]
    versions = {int(version.version): version for version in tracker.client.search_model_versions("name = 'shapes'")}
    assert all(versions[number].tags["promotion.state"] == "champion" for number in best)
    assert all(str(version.source).startswith("mlflow-artifacts:") for version in versions.values())
