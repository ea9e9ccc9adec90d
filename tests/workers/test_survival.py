"""A training on Ray survives killed workers, hosts that come and go and a full disk; other failures end it clearly."""

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import survival_loops
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from session_processes import processes_of_this_session

from pipeline.data.ingest import ingest
from pipeline.data.order import epoch_order
from pipeline.data.preprocess import preprocess
from pipeline.data.ray_rows import materialize_split, to_rows
from pipeline.settings.config import trained_configs
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.training.batches import steps_per_epoch
from pipeline.training.checkpoint_store import NAME, CheckpointsDamaged, CheckpointStore
from pipeline.training.config import TrainingConfig
from pipeline.workers import train as training
from pipeline.workers.in_process import TrainingError
from pipeline.workers.ray_internals import START_SECONDS_VARIABLE
from pipeline.workflow.channel import Channel

pytestmark = pytest.mark.usefixtures("ray_cluster")
EVERY = 5  # steps between checkpoints


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def manifest(storage: Storage, ray_cluster: None) -> dict[str, Any]:
    data = quickstart().data
    return preprocess(data, ingest(data, storage, "ingested"), storage, "data")


class Run(threading.Thread):
    """A training of the digits on two workers, in a separate thread."""

    def __init__(self, storage: Storage, manifest: dict[str, Any], state: str, **settings: Any) -> None:
        super().__init__(daemon=True)
        self.storage, self.manifest, self.state = storage, manifest, state
        self.model, train = trained_configs(quickstart(), manifest)
        self.config = TrainingConfig(**{**vars(train), "learning_rate_schedule": "constant", **settings})
        self.channel = Channel()
        self.output: dict[str, Any] | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.output = training.train(
                self.model, self.config, self.manifest, self.storage, state=self.state, channel=self.channel
            )
        except BaseException as error:
            self.error = error

    def checkpoints(self) -> list[str]:
        return [name for name in self.storage.list(f"{self.state}/checkpoints") if NAME.fullmatch(name)]

    def wait_for_another_checkpoint(self, timeout: float = 600) -> None:
        last, deadline = self.checkpoints()[-1:], time.monotonic() + timeout
        while self.checkpoints()[-1:] == last:
            assert self.is_alive(), f"ended: {self.output} {self.error}"
            assert time.monotonic() < deadline, f"no checkpoint after {last} in {timeout} s"
            time.sleep(0.02)

    def wait_for_other_workers(self, pids: list[int], timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while not (now := worker_pids()) or set(now) & set(pids):
            assert self.is_alive(), f"ended: {self.output} {self.error}"
            assert time.monotonic() < deadline, f"no other workers than {pids} in {timeout} s"
            time.sleep(0.1)

    def result(self, timeout: float = 600) -> dict[str, Any]:
        self.join(timeout)
        assert not self.is_alive(), f"not done in {timeout} s"
        if self.error:
            raise self.error
        assert self.output is not None
        return self.output

    def final_weights(self) -> dict[str, np.ndarray]:
        """The weights in the last checkpoint. The counts are the longest one-dimensional weight."""
        path = self.storage.fs_path(self.result()["checkpoint"])
        with np.load(f"{path}/arrays.npz") as arrays:
            return {name: arrays[name] for name in arrays if name.startswith("weight_")}


def worker_pids() -> list[int]:
    return sorted(pid for pid, command in processes_of_this_session().items() if "RayTrainWorker" in command)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes `train` run `counting_loop`; returns the file to which rank 0 writes its steps."""
    steps = tmp_path / "steps"

    def loop(settings: dict[str, Any]) -> dict[str, Any]:
        return survival_loops.counting_loop(settings | {"steps": str(steps)})

    monkeypatch.setattr(training, "train_loop_per_worker", loop)
    return steps


def expected_counts(run: Run) -> np.ndarray:
    """How often each epoch trains on each row, from the definition of the order."""
    rows = len(to_rows(materialize_split(run.manifest, "train", run.storage)).labels)
    used = steps_per_epoch(rows, run.config.global_batch_size) * run.config.global_batch_size
    counts = np.zeros((run.config.epochs, rows))
    for epoch in range(run.config.epochs):
        counts[epoch, epoch_order(rows, run.config.seed, epoch)[:used]] += 1
    return counts


def steps_lost(log: Path, steps: int) -> list[int]:
    """For each process after the first, how many earlier steps it had to train again."""
    lost, before, process = [], -1, None
    for pid, epoch, step in (map(int, line.split()) for line in log.read_text().splitlines()):
        position = epoch * steps + step
        if process not in (None, pid):
            lost.append(before + 1 - position)
        before, process = position, pid
    return lost


@pytest.mark.long
@pytest.mark.parametrize(("kills", "epochs"), [(1, 8), pytest.param(20, 90, marks=pytest.mark.slow)])
def test_killed_workers_cost_time_and_nothing_else(
    kills: int, epochs: int, storage: Storage, manifest: dict[str, Any], counting: Path
) -> None:
    settings = {"epochs": epochs, "early_stopping_patience": epochs, "max_failures": kills, "deterministic": True}
    run = Run(storage, manifest, f"killed-{kills}", checkpoint_every_steps=EVERY, **settings)
    run.start()
    run.wait_for_another_checkpoint()
    choice, recovery = random.Random(1), []
    for _ in range(kills):
        time.sleep(choice.uniform(0, 1))
        killed, pids = time.monotonic(), worker_pids()
        os.kill(choice.choice(pids), signal.SIGKILL)
        run.wait_for_other_workers(pids)  # the survivor may still finish a checkpoint
        run.wait_for_another_checkpoint()
        recovery.append(time.monotonic() - killed)
    assert run.result()["epochs"] == epochs

    expected = expected_counts(run)
    weights = run.final_weights()
    (counts,) = [value for value in weights.values() if value.shape == (expected.size,)]
    np.testing.assert_array_equal(counts.reshape(expected.shape), expected)
    lost = steps_lost(counting, round(expected[0].sum()) // run.config.global_batch_size)
    assert len(lost) == kills
    assert all(0 <= steps <= EVERY for steps in lost), lost
    print(
        f"{kills} kills: recovered after {statistics.median(recovery):.1f} s (median), {max(recovery):.1f} s (worst); "
        f"steps lost: {lost}"
    )
    if kills > 1:
        straight = Run(storage, manifest, f"straight-{kills}", **settings)
        straight.start()
        for name, value in straight.final_weights().items():
            np.testing.assert_allclose(weights[name], value, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.long
def test_a_damaged_checkpoint_is_said_to_who_waits_by_one_of_the_workers(
    storage: Storage, manifest: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "arrays.npz").write_bytes(bytes(1000))
    store = CheckpointStore(storage, "damaged/checkpoints", kept=2)
    path = store.path(store.commit(tmp_path, 11, 0))
    storage.write_bytes(f"{path}/arrays.npz", bytes(900))  # a disk has lost its end
    run = Run(storage, manifest, "damaged", epochs=1, warmup_epochs=0)
    run.start()
    assert run.result()["epochs"] == 1
    said = [event for event in run.channel.take() if isinstance(event, CheckpointsDamaged)]
    assert said == [CheckpointsDamaged((storage.absolute(path),))]


def test_a_worker_that_cannot_import_tensorflow_ends_in_an_error(
    storage: Storage, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ImportError('libtensorflow.so.2: cannot open shared object file')")
    trainer: Any = DataParallelTrainer

    def with_broken_workers(*, run_config: Any, **options: Any) -> Any:
        run_config.worker_runtime_env = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
        return trainer(run_config=run_config, **options)

    monkeypatch.setattr(training, "DataParallelTrainer", with_broken_workers)
    run = Run(storage, manifest, "broken", max_failures=20)
    start = time.monotonic()
    run.start()
    with pytest.raises(TrainingError, match=r"^the worker on .* cannot import TensorFlow .*libtensorflow\.so\.2"):
        run.result()
    print(f"ended after {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < 90


@pytest.mark.slow
def test_a_full_disk_ends_the_training_where_it_can_go_on(
    storage: Storage, manifest: dict[str, Any], small_disk: Path
) -> None:
    # Only the checkpoints are on the small disk, which has room for a few of them.
    (Path(storage.root) / "full").symlink_to(small_disk)
    hog = small_disk / "hog"
    run = Run(storage, manifest, "full", epochs=30, max_failures=1)
    run.start()
    run.wait_for_another_checkpoint()
    with contextlib.suppress(OSError), hog.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
    with pytest.raises(TrainingError, match=rf"the checkpoint {storage.root}/full/.*No space left"):
        run.result()
    done = int(run.checkpoints()[-1][:6])
    hog.unlink()
    # Four checkpoints, of which one is just written, and the final model need more than 2 MiB.
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    again = Run(storage, manifest, "full", epochs=30, max_failures=0)
    again.start()
    assert again.result()["epochs"] == 30
    assert 0 < done < 30


@pytest.mark.slow
def test_workers_for_which_there_is_no_room_end_in_an_error(
    storage: Storage, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = ray.util.placement_group([{"CPU": 1}])  # a run checks for free CPUs before it starts; this takes one later
    ray.get(guest.ready())
    monkeypatch.setenv(START_SECONDS_VARIABLE, "5")
    run = Run(storage, manifest, "no-room")
    start = time.monotonic()
    run.start()
    try:
        with pytest.raises(TrainingError, match=r"num_workers = 2 .* no room, of 1 CPUs"):
            run.result()
    finally:
        ray.util.remove_placement_group(guest)
    print(f"ended after {time.monotonic() - start:.1f} s")


@pytest.mark.slow
def test_an_elastic_training_takes_what_hosts_there_are(
    storage: Storage, manifest: dict[str, Any], tmp_path: Path, ray_folder: Path
) -> None:
    epochs = 120
    # Sums in another order round differently, which Adam would amplify.
    train = {"epochs": epochs, "early_stopping_patience": epochs, "learning_rate_schedule": "constant"}
    train |= {"optimizer": "sgd", "learning_rate": 0.02}
    orders = {"storage": str(tmp_path / "runs"), "train": train}
    command = [sys.executable, str(Path(__file__).with_name("elastic_cluster.py")), json.dumps(orders)]
    environment = os.environ | {"RAY_TMPDIR": str(ray_folder)}
    elastic = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=environment)
    assert elastic.returncode == 0, elastic.stdout + elastic.stderr
    history = json.loads(elastic.stdout.splitlines()[-1])
    sizes = [size for size, _ in itertools.groupby(epoch["num_workers"] for epoch in history)]
    assert sizes == [1, 2, 1, 2, 1]
    fixed = Run(storage, manifest, "fixed", num_workers=1, **train)
    fixed.model = replace(fixed.model, dropout=0.0)
    fixed.start()
    for found, expected in zip(history, fixed.result()["history"], strict=True):
        for name in ("loss", "val_loss"):
            assert found[name] == pytest.approx(expected[name], abs=1e-4), found["epoch"]


@pytest.mark.slow
def test_of_three_workers_one_stands_by_where_two_divide_the_batch(storage: Storage, manifest: dict[str, Any]) -> None:
    run = Run(storage, manifest, "three", num_workers=(1, 4), cpus_per_worker=0.65, epochs=3)
    run.start()
    output = run.result()
    assert run.config.global_batch_size == 64
    assert [epoch["num_workers"] for epoch in output["history"]] == [2, 2, 2]
    assert output["num_workers"] == 2
