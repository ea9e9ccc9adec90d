"""Processes in reserve: they replace killed workers, and go away when nobody needs them or memory gets scarce."""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from session_processes import processes_of_this_session

from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.settings.config import trained_configs
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.training.config import TrainingConfig
from pipeline.workers import ray_internals, reserve
from pipeline.workers.train import train
from pipeline.workflow.channel import Channel
from pipeline.workflow.task import StoppedEarly

SECONDS = 120.0


def with_tensorflow() -> dict[int, str]:
    """Process id and name of the processes of the cluster that have imported TensorFlow."""
    found = {}
    for pid, name in processes_of_this_session().items():
        try:
            if name.startswith("ray::") and "libtensorflow_framework" in Path(f"/proc/{pid}/maps").read_text():
                found[pid] = name
        except OSError:  # it has ended meanwhile
            continue
    return found


def own_bytes(pid: int) -> int:
    """What a process has of the memory alone, once it does nothing any more."""
    spent = -1
    while (now := sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))) > spent + 5:
        spent = now
        time.sleep(3)
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith("Anonymous:"))


def wait_for(what: str, workers: int, spare: int, training: threading.Thread) -> tuple[set[int], set[int]]:
    """Waits until so many workers train and so many processes are in reserve; returns their ids."""
    deadline = time.monotonic() + SECONDS
    while True:
        names = with_tensorflow()
        busy = {pid for pid, name in names.items() if "RayTrainWorker" in name}
        if (len(busy), len(names) - len(busy)) == (workers, spare):
            return busy, set(names) - busy
        assert training.is_alive() or not workers, f"{what}: the training has ended"
        assert time.monotonic() < deadline, f"{what}: {names}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_reserve_replaces_workers_and_ends_with_them(tmp_path: Path) -> None:
    storage, settings = Storage(str(tmp_path)), quickstart()
    manifest = preprocess(settings.data, ingest(settings.data, storage, "ingested"), storage, "data")
    model, config = trained_configs(settings, manifest)
    config = TrainingConfig(
        **{**vars(config), "epochs": 10**6, "early_stopping_patience": 10**6, "learning_rate_schedule": "constant"},
    )
    channel, ends = Channel(), []

    def run() -> None:
        try:
            train(model, config, manifest, storage, state="training", channel=channel)
        except BaseException as error:
            ends.append(error)

    training = threading.Thread(target=run, daemon=True)
    training.start()
    workers, spare = wait_for("first group", 2, 2, training)
    assert ray.available_resources().get("CPU", 0) == 0
    assert ray.cluster_resources()["CPU"] == 2, "the reserve holds none"
    sizes = [own_bytes(pid) for pid in spare]
    print(f"processes in reserve: {[size >> 20 for size in sizes]} MiB")
    assert max(sizes) < reserve.RESERVE_BYTES
    os.kill(min(workers), signal.SIGKILL)
    again, _ = wait_for("second group", 2, 2, training)
    assert again == spare, "the new workers are the processes that were in reserve"
    channel.request_stop()
    training.join(SECONDS)
    assert [type(end) for end in ends] == [StoppedEarly]
    wait_for("end", 0, 0, training)


@pytest.mark.parametrize(("spare_mib", "started"), [(3000, 1), (700, 0), (-100, 0)])
def test_a_host_with_little_memory_has_no_reserve(
    monkeypatch: pytest.MonkeyPatch, spare_mib: int, started: int
) -> None:
    calls: list[float] = []
    monkeypatch.setattr(ray_internals, "start_idle_process", lambda: calls.append(time.monotonic()))
    monkeypatch.setattr(reserve, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(reserve, "_spare_bytes", lambda: spare_mib << 20)
    keep = reserve.keep_one(local_rank=1, local_size=2)
    assert not calls, "not before a checkpoint"
    for _ in range(3):
        keep()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    assert len(calls) == started


def test_a_reserve_that_cannot_be_started_costs_the_training_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ConnectionError("no raylet answers")

    monkeypatch.setattr(ray_internals, "start_idle_process", fail)
    monkeypatch.setattr(reserve, "DELAY_SECONDS", 0.0)
    reserve.keep_one(local_rank=1, local_size=1)()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    assert "no process in reserve" in caplog.text
    assert "no raylet answers" in caplog.text


def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reserve, "_CGROUPS", ())
    host, total = reserve._spare_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert -0.15 * total <= host <= 0.85 * total
    texts = {"max": 1000 << 20, "current": 1100 << 20, "stat": f"anon 1\ninactive_file {50 << 20}\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(str(text))
    monkeypatch.setattr(reserve, "_CGROUPS", (tuple(str(tmp_path / name) for name in texts),))
    assert reserve._spare_bytes() == -(200 << 20), "1000 - 1100 + 50 MiB are free, and 150 are to stay free"
    (tmp_path / "max").write_text("max\n")  # no limit
    assert abs(reserve._spare_bytes() - host) < total // 4


def test_one_worker_of_a_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"\0perceiver-test-{os.getpid()}"
    monkeypatch.setattr(reserve, "_name", lambda: name)
    monkeypatch.setattr(reserve, "_present", [])
    reserve._be_present()
    reserve._be_present()
    (listener,) = reserve._present
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(name)
        reader.settimeout(0.1)
        with pytest.raises(TimeoutError):
            reader.recv(1)
        listener.close()  # as at the end of the worker's process
        with contextlib.suppress(ConnectionResetError):
            assert reader.recv(1) == b""


@pytest.mark.parametrize(("changes", "has"), [({}, True), ({"reserve": False}, False), ({"max_failures": 0}, False)])
def test_which_trainings_have_a_reserve(changes: dict[str, Any], has: bool) -> None:
    assert TrainingConfig(**changes).has_reserve == has
    assert not TrainingConfig(**changes, use_gpu=True).has_reserve
    assert not quickstart().trial_training().has_reserve
