"""Records on disk reach a real store once and in order, whatever happens to the server or to the driver."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_server import TrackingServer

from pipeline.storage import Storage
from pipeline.tracking.outbox import Outbox, Record, Unsent, has_waiting
from pipeline.tracking.sender import Sender
from pipeline.tracking.tracker import Tracker

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    made = TrackingServer(tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


def sender_to(uri: str, storage: Storage, identity: str) -> Sender:
    return Sender(lambda: Tracker(uri, "shapes"), storage, identity, "shapes")


def epoch(number: int) -> Record:
    return Record("train", history=({"epoch": number, "timestamp": 1e9 + number, "loss": 1 / number, "top1": 0.5},))


def history(uri: str, identity: str, key: str = "loss") -> list[tuple[int, float]]:
    """Step and value of each point of a metric, in the order in which they were logged."""
    tracker = Tracker(uri, "shapes")
    run_id = tracker.find_run(f"{identity}/train")
    assert run_id is not None
    metrics = tracker.client.get_metric_history(run_id, key)
    assert [metric.timestamp for metric in metrics] == [1000 * (10**9 + metric.step) for metric in metrics]
    return [(metric.step, metric.value) for metric in metrics]


def expected(count: int) -> list[tuple[int, float]]:
    return [(number, 1 / number) for number in range(1, count + 1)]


def test_a_server_that_dies_hangs_and_returns_gets_every_record_once(server: TrackingServer, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    sender = sender_to(server.uri, storage, "dies")
    slowest = 0.0
    for number in range(1, 31):
        if number == 10:
            server.kill()
        if number == 20:
            server.start()
        if number == 25:
            server.signal(signal.SIGSTOP)
        start = time.monotonic()
        sender.record(epoch(number))
        slowest = max(slowest, time.monotonic() - start)
        time.sleep(0.05)
    server.signal(signal.SIGCONT)
    assert sender.close(60) is None
    assert slowest < 0.5, "recording must wait for the disk only, not for the server"
    assert history(server.uri, "dies") == expected(30)
    assert history(server.uri, "dies", "top1") == [(number, 0.5) for number in range(1, 31)]
    assert not has_waiting(storage, "dies")
    tracker = Tracker(server.uri, "shapes")
    assert len(tracker.client.search_runs([tracker.experiment_id], "tags.`pipeline.identity` LIKE 'dies%'")) == 2


def test_unsent_records_are_reported_and_sent_by_the_next_sender(server: TrackingServer, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    dead = sender_to("http://127.0.0.1:9", storage, "left")
    for number in range(1, 4):
        dead.record(epoch(number))
    start = time.monotonic()
    unsent = dead.close(1)
    assert time.monotonic() - start < 3
    assert isinstance(unsent, Unsent)
    assert (unsent.waiting, unsent.unwritten, unsent.refused) == (3, 0, 0)
    assert f"3 records have not reached the tracking server; they lie in {tmp_path}/tracking/left" in str(unsent)
    assert "the same command sends them" in str(unsent)
    assert has_waiting(storage, "left")
    again = sender_to(server.uri, storage, "left")
    again.record(epoch(4))
    assert again.close(60) is None
    assert history(server.uri, "left") == expected(4)


def test_a_lost_answer_causes_no_duplicate(server: TrackingServer, tmp_path: Path) -> None:
    """The connection breaks after the server has stored the metrics, before its answer arrives."""
    storage = Storage(str(tmp_path))
    lost: list[Any] = []

    def open_tracker() -> Tracker:
        tracker = Tracker(server.uri, "shapes")
        log_batch = tracker.client.log_batch

        def log_batch_and_lose_the_answer(*args: Any, **kwargs: Any) -> None:
            log_batch(*args, **kwargs)
            if kwargs.get("metrics") and len(lost) < 3:
                lost.append(kwargs)
                raise ConnectionError("broken pipe")

        tracker.client.log_batch = log_batch_and_lose_the_answer  # type: ignore[method-assign]
        return tracker

    sender = Sender(open_tracker, storage, "answers", "shapes")
    for number in range(1, 6):
        sender.record(epoch(number))
    assert sender.close(60) is None
    assert len(lost) == 3
    assert history(server.uri, "answers") == expected(5)


def test_no_record_of_a_killed_driver_is_lost(server: TrackingServer, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        sys.path += ["tests", "tests/tracking"]
        from pipeline.storage import Storage
        from test_sender import epoch, sender_to
        sender = sender_to(sys.argv[1], Storage(sys.argv[2]), "killed")
        for number in range(1, 41):
            sender.record(epoch(number))
        while len(sender._outbox) > 30:
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), server.uri, str(tmp_path)]
    result = subprocess.run(command, cwd=PROJECT, check=False, timeout=600)
    assert result.returncode == -signal.SIGKILL
    storage = Storage(str(tmp_path))
    assert 20 <= len(Outbox(storage, "killed")) <= 31
    assert sender_to(server.uri, storage, "killed").close(60) is None
    assert history(server.uri, "killed") == expected(40)


def test_a_refused_record_is_set_aside(server: TrackingServer, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    sender = sender_to(server.uri, storage, "refused")
    sender.record(epoch(1))
    sender.record(Record("train", metrics={"loss*": 1.0}))
    sender.record(Record("train", files={"page.html": "nowhere/page.html"}))
    sender.record(epoch(2))
    unsent = sender.close(60)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (0, 2)
    assert f"refused 2 records; they lie in {tmp_path}/tracking/refused/refused" in str(unsent)
    assert history(server.uri, "refused") == expected(2)
    first, _ = storage.list("tracking/refused/refused")
    assert storage.read_json(f"tracking/refused/refused/{first}")["metrics"] == {"loss*": 1.0}
    assert not has_waiting(storage, "refused")


def test_a_name_that_is_refused_costs_no_other_value(server: TrackingServer, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    sender = sender_to(server.uri, storage, "names")
    rows = tuple({"epoch": n, "timestamp": 1e9 + n, "loss": 1 / n, "a*b": 2.0} for n in (1, 2))
    values = {"top1": 0.5, "top5*": 0.9, "n" * 251: 1.0}
    named = {"section.field": "1", "section*": "2"}
    sender.record(Record("train", params=named, tags=named, history=rows, metrics=values, status="FINISHED"))
    unsent = sender.close(60)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused) == (0, 1)
    assert "*" in unsent.reason
    assert history(server.uri, "names") == expected(2)
    tracker = Tracker(server.uri, "shapes")
    run = tracker.client.get_run(str(tracker.find_run("names/train")))
    assert (run.data.params, run.data.metrics) == ({"section.field": "1"}, {"loss": 0.5, "top1": 0.5})
    assert (run.data.tags["section.field"], run.info.status) == ("1", "FINISHED")


def test_a_run_that_was_deleted_is_created_again(tmp_path: Path) -> None:
    """As with a new server: later records go to a new run."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    sender = sender_to(store, Storage(str(tmp_path)), "lost")
    sender.record(epoch(1))
    tracker = Tracker(store, "shapes")
    deadline = time.monotonic() + 60
    while (run_id := tracker.find_run("lost/train")) is None or len(sender._outbox):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker.client.delete_run(run_id)
    sender.record(epoch(2))
    assert sender.close(60) is None
    assert history(store, "lost") == [(2, 0.5)]


def test_every_field_of_a_record_is_logged(tmp_path: Path) -> None:
    store, storage = f"sqlite:///{tmp_path}/mlflow.db", Storage(str(tmp_path))
    storage.write_bytes("made/page.html", b"<p>made</p>")
    sender = sender_to(store, storage, "all")
    dataset = {"name": "shapes", "digest": "ab" * 32, "source": "/data", "context": "training", "profile": {}}
    sender.record(
        Record(
            params={"section.field": "1"},
            tags={"preset": "shapes"},
            metrics={"top1": float("nan")},
            texts={"notes/a.txt": "hello"},
            files={"report/page.html": "made/page.html"},
            dataset=dataset,
        )
    )
    sender.record(Record("search/trial", status="FAILED"))
    assert sender.close(60) is None
    tracker = Tracker(store, "shapes")
    runs = {run.info.run_name: run for run in tracker.client.search_runs([tracker.experiment_id])}
    assert sorted(runs) == ["search", "shapes", "trial"]
    parent = runs["shapes"]
    assert (parent.data.params, parent.data.tags["preset"]) == ({"section.field": "1"}, "shapes")
    assert parent.inputs is not None
    assert parent.inputs.dataset_inputs[0].dataset.digest == "ab" * 18
    assert [file.path for file in tracker.client.list_artifacts(parent.info.run_id)] == ["notes", "report"]
    assert runs["trial"].data.tags["mlflow.parentRunId"] == runs["search"].info.run_id
    assert runs["trial"].info.status == "FAILED"


def test_a_record_of_an_earlier_version_is_sent(tmp_path: Path) -> None:
    """The file is as the project wrote it before `Record` got its name."""
    store, storage = f"sqlite:///{tmp_path}/mlflow.db", Storage(str(tmp_path))
    folder = tmp_path / "tracking" / "earlier"
    folder.mkdir(parents=True)
    (folder / "000000007.json").write_text(
        """{
 "dataset": null,
 "files": {},
 "history": [
  {
   "epoch": 1,
   "loss": 1.0,
   "timestamp": 1000000001.0
  }
 ],
 "metrics": {},
 "params": {},
 "run": "train",
 "status": null,
 "tags": {
  "task.key": "abc"
 },
 "texts": {}
}
"""
    )
    assert has_waiting(storage, "earlier")
    sender = sender_to(store, storage, "earlier")
    sender.record(epoch(2))
    assert sender.close(60) is None
    assert history(store, "earlier") == expected(2)
    tracker = Tracker(store, "shapes")
    run_id = tracker.find_run("earlier/train")
    assert run_id is not None
    assert tracker.client.get_run(run_id).data.tags["task.key"] == "abc"
    assert not has_waiting(storage, "earlier")


def test_a_full_disk_does_not_end_the_run(small_disk: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(b"x" * 2**22)
    sender = sender_to(store, Storage(str(small_disk)), "full")
    sender.record(epoch(1))
    assert sender.close(60) is None
    assert history(store, "full") == expected(1)
