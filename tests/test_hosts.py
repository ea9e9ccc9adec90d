"""`ray up`, `ray submit` and `ray down` with the repository's ray_cluster.yaml on three hosts made on this machine.

The tests share one cluster, depend on each other and run in their order. They are skipped where hosts cannot be made,
or fail if PERCEIVER_REQUIRE_HOSTS is set.
"""

import json
import os
import re
import shlex
import signal
import sqlite3
import sys
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("hosts")))

import cluster_state
from classified import refuses_what_is_not_shared
from cluster_state import (
    WORKER,
    cluster_up,
    epochs_in,
    epochs_of,
    is_open,
    manifest,
    most_attempts,
    num_nodes,
    trains_on,
)
from host_commands import wait_until
from host_packages import ROOT, CannotMakeHosts, install_what_is_missing
from hosts import Host, Hosts
from object_store import served, stream

pytestmark = pytest.mark.slow
SHARED = "/mnt/keras-perceiver-ray"
# All tasks of the pipeline but the search, with as little work as possible.
SMALL = ("quickstart", "--search.num-trials", "0", "--train.warmup-epochs", "1", "--evaluation.corruption-rows", "0")
DRIVER = r"^python \S*run\.py"
CTRL_C = b"\x03"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head and two workers on which the cluster is up."""
    try:
        install_what_is_missing()
    except CannotMakeHosts as error:
        if os.environ.get("PERCEIVER_REQUIRE_HOSTS"):
            raise
        pytest.skip(str(error))
    with cluster_up(num_workers=2) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(hosts: Hosts) -> Iterator[None]:
    """Mends cut links, and kills drivers of a failed test, which would take the resources of the next one."""
    yield
    for host in hosts.workers:
        host.mend()
    for driver in hosts.head.processes(DRIVER):
        os.kill(driver, signal.SIGKILL)


def long(epochs: int, runs: str) -> tuple[str, ...]:
    """Arguments of a run that trains for `epochs` epochs, with its own storage."""
    training = ("--train.epochs", str(epochs), "--train.early-stopping-patience", str(epochs))
    return (*SMALL, *training, "--storage", f"{SHARED}/{runs}")


def test_the_same_installation_is_on_every_host(hosts: Hosts) -> None:
    def installed(host: Host) -> str:
        return hosts.ssh(host, "python -m pip freeze --all").text

    assert "tensorflow==" in installed(hosts.head)
    assert len({installed(host) for host in (hosts.head, *hosts.workers)}) == 1


def test_from_submit_to_a_registered_model(hosts: Hosts) -> None:
    submitted = hosts.start_submit(*SMALL, "--train.epochs", "20")
    wait_until(lambda: len(trains_on(hosts)) == 2, 600, "workers on two hosts")
    hosts_of_workers = trains_on(hosts)
    print("workers on", sorted(host.address for host in (hosts.head, *hosts.workers) if host.name in hosts_of_workers))
    result = submitted.wait(240)
    assert result.code == 0, result.text
    hosts.seconds["the first run"] = result.seconds
    assert "models:/perceiver/1" in result.text[-3000:], "not among the last lines"
    assert len(hosts_of_workers) == 2
    # Nothing is in a home folder of the head, because the head may be lost.
    assert manifest(hosts, "register")["output"]["version"] == "1"
    with sqlite3.connect(hosts.shared / "mlflow.db") as database:
        assert database.execute("SELECT name, version FROM model_versions").fetchall() == [("perceiver", 1)]
    assert "runs" not in hosts.ssh(hosts.head, "ls ~").text.split()
    again = hosts.submit(*SMALL, "--train.epochs", "20", timeout=60)
    assert "done before" in again.text


def test_a_wrong_argument_is_seen_where_it_was_given(hosts: Hosts) -> None:
    result = hosts.submit("quickstart", "--train.epochs", "none", check=False)
    assert result.code != 0
    assert "Error parsing --train.epochs: invalid literal for int() with base 10: 'none'" in result.text
    result = hosts.submit("quickstart", "--storage", "/proc/none", check=False)
    assert result.code != 0
    assert "error: storage = '/proc/none' cannot be read and written" in result.text


def test_an_argument_with_spaces(hosts: Hosts) -> None:
    arguments = (*SMALL, "--train.epochs", "20", "--summary-json")
    result = hosts.submit(*arguments, "/tmp/a summary.json", check=False)
    assert result.code != 0
    assert "Unrecognized options: summary.json" in result.text
    hosts.submit(*arguments, "'/tmp/a summary.json'")  # quoted twice, because the shell on the head removes one level
    summary = json.loads(hosts.ssh(hosts.head, "cat '/tmp/a summary.json'").text)
    assert summary["model"]["version"] == "1"


def test_a_folder_that_is_not_shared_is_refused(hosts: Hosts) -> None:
    result = hosts.submit(*SMALL, "--storage", "/home/ray/runs", check=False)
    assert result.code != 0
    assert re.search(r"error: storage = '/home/ray/runs': node 10\.77\.0\.1[12] sees another folder", result.text)


def test_images_are_classified_only_where_every_host_sees_them(hosts: Hosts) -> None:
    refuses_what_is_not_shared(hosts, SHARED, "models:/perceiver/1")


@pytest.mark.parametrize("token", ["none", "wrong"])
def test_without_the_token_nobody_is_let_in(hosts: Hosts, token: str) -> None:
    listening = [line.split()[3].rpartition(":") for line in hosts.ssh(hosts.head, "ss -Hltn").text.splitlines()]
    ports = sorted({port for address, _, port in listening if "127.0.0.1" not in address} - {"22"}, key=int)
    assert {"6379", "10001"} <= set(ports)
    assert ("127.0.0.1", ":", "8265") in listening
    assert "8265" not in ports
    access = {"none": "RAY_AUTH_MODE=disabled", "wrong": f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'0' * 64}"}[token]
    code = shlex.quote((ROOT / "tests/hosts/stranger.py").read_text())
    ask = f"mkdir -p /tmp/stranger; HOME=/tmp/stranger {access} timeout 150 python -c {code}"
    result = hosts.ssh(hosts.workers[0], f"{ask} {hosts.head.address} 8265 {' '.join(ports)}", timeout=600)
    answers = json.loads(re.findall(r"^ANSWERS (.*)$", result.text, re.MULTILINE)[0])
    print("answers without the token:", sorted(answers))
    # Metrics for Prometheus are served without a token; they contain numbers only.
    assert {name: text for name, text in answers.items() if not text.startswith("# HELP ")} == {}, result.text
    assert "InvalidAuthToken" in result.text
    # The dashboard listens on the head itself only, and asks for the token there.
    curl = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/"
    assert hosts.ssh(hosts.head, curl).text == "401"
    assert hosts.ssh(hosts.head, f'{curl} -H "Authorization: Bearer $(cat ~/.ray/auth_token)"').text == "200"


def test_a_stranger_cannot_connect_to_tensorflow(hosts: Hosts) -> None:
    submitted = hosts.start_submit(*long(60, "ports"))
    submitted.wait_for(r"train +epoch 2/60: loss", 240)
    found = cluster_state.open_to_strangers(hosts)
    result = submitted.wait(240)
    assert result.code == 0
    if "TensorFlow's port of a worker on" in " ".join(result.text.split()):
        pytest.skip("this kernel refuses socket filters of users, as the run has said")
    # Each worker has two ports. One is Ray's own, which asks for the token.
    assert found == [[False, True], [False, True]]


def test_ray_job_submit(hosts: Hosts) -> None:
    forwarded = hosts.start("dashboard", "--port", "18265", str(hosts.yaml))
    try:
        forwarded.wait_for("18265", 60)
        wait_until(lambda: is_open(18265), 30, "nothing is forwarded")
        job = ("job", "submit", "--address", "http://127.0.0.1:18265", "--", "perceiver-pipeline", *SMALL)
        done = hosts.ray(*job, "--train.epochs", "20", timeout=600)
        assert "models:/perceiver/1" in done.text
        failed = hosts.ray(*job, "--train.epochs", "none", timeout=600, check=False)
        assert failed.code != 0
        assert "Error parsing --train.epochs" in failed.text
    finally:
        forwarded.kill()


def test_drivers_at_once_do_the_work_once(hosts: Hosts) -> None:
    """Two drivers of the same run, and one of another run with the same training."""
    arguments = (*SMALL, "--train.epochs", "20", "--storage", f"{SHARED}/several")
    drivers = [hosts.start_submit(*arguments, *more) for more in ((), (), ("--evaluation.seed", "1"))]
    results = [driver.wait(400) for driver in drivers]
    assert [result.code for result in results] == [0, 0, 0], [result.text for result in results]
    assert all("models:/perceiver/" in result.text for result in results)
    said = [" ".join(result.text.split()) for result in results]  # a terminal folds lines
    assert sorted("waiting for it" in text for text in said) == [False, True, True]
    assert sum("for another run: waiting for it" in text for text in said) in (1, 2)
    for task, times in {"train": 1, "evaluate": 2, "register": 2}.items():
        assert sum(text.count(f"{task} started") for text in said) == times, task
    assert most_attempts(hosts, "several") == 1
    with sqlite3.connect(hosts.shared / "mlflow.db") as database:
        for path in (hosts.shared / "several/tasks/register").glob("*/manifest.json"):
            run = json.loads(path.read_text())["output"]["run_id"]
            assert len(database.execute("SELECT 1 FROM model_versions WHERE run_id = ?", [run]).fetchall()) == 1


def test_a_host_that_is_cut_off_and_comes_back(hosts: Hosts) -> None:
    *_, last = hosts.workers
    elastic = ("--train.num-workers", "1:3", "--train.global-batch-size", "66", "--train.cpus-per-worker", "2")
    # The training must still run when the host is back: the head sees its loss after 12 to 65 s, the host takes 55 s
    # to join, and an elastic training looks for new hosts every 30 s. Starting workers do not train meanwhile.
    submitted = hosts.start_submit(*long(epochs_in(hosts, 110), "elastic"), *elastic)
    submitted.wait_for(r"train +epoch 1/\d+: loss", 240)
    wait_until(lambda: len(trains_on(hosts)) == 3, 300, "workers on three hosts")
    told = len(epochs_of(submitted.text))
    wait_until(lambda: len(epochs_of(submitted.text)) > told + 1, 600, "they train")
    lost = set(last.processes(WORKER))  # they stay for a while, because the head cannot reach them
    last.cut()
    seen = wait_until(lambda: num_nodes(hosts) == 2, 90, "the head sees the loss", pause=1)
    hosts.seconds["loss of a host seen"] = seen
    before = epochs_of(submitted.text)[-1]
    continued = wait_until(lambda: epochs_of(submitted.text)[-1] > before + 1, 180, "the training goes on")
    hosts.seconds["epochs go on"] = continued
    last.mend()
    used = wait_until(lambda: set(last.processes(WORKER)) - lost != set(), 240, f"{last.name} trains again")
    hosts.seconds["host used again"] = used
    result = submitted.wait(600)
    assert result.code == 0, result.text
    assert "models:/perceiver/" in result.text
    history = manifest(hosts, "train", "elastic")["output"]["history"]
    assert [workers for workers, _ in groupby(epoch["num_workers"] for epoch in history)][-3:] == [3, 2, 3]


def test_a_driver_outlives_its_connection_and_is_found_again(hosts: Hosts) -> None:
    arguments = long(40, "cut")
    submitted = hosts.start_submit(*arguments)
    submitted.wait_for(r"epoch 2/40", 240)
    (driver,) = hosts.head.processes(DRIVER)
    for session in hosts.head.processes(r"^sshd: ray"):
        os.kill(session, signal.SIGKILL)
    assert submitted.wait(60).code != 0
    assert hosts.head.processes(DRIVER) == [driver]
    again = hosts.start_submit(*arguments)
    again.wait_for(r"process \d+ on kpr-head works at this run: waiting for it", 60)
    result = again.wait(300)
    assert result.code == 0, result.text
    assert "models:/perceiver/" in result.text
    assert most_attempts(hosts, "cut") == 1
    log = hosts.ssh(hosts.head, "cat /tmp/perceiver-pipeline-*.log").text
    # The log has plain lines, and none is missing.
    assert epochs_of(log)[-30:] == list(range(11, 41)), "the driver prints no more after its terminal is gone"
    assert "\x1b" not in log.rpartition("epoch 11/40: loss")[2]


def test_after_ctrl_c_and_after_a_killed_driver_the_same_command_goes_on(hosts: Hosts) -> None:
    arguments = long(30, "killed")
    stopped = hosts.start_submit(*arguments, terminal=True)
    stopped.wait_for(r"train +epoch 3/30: loss", 240)
    stopped.type(CTRL_C)
    result = stopped.wait(120)
    assert result.code != 0
    assert "stopped; the same command goes on from here" in result.text
    epochs = [epochs_of(result.text)]

    killed = hosts.start_submit(*arguments)
    killed.wait_for(r"train +epoch 10/30: loss", 240)
    (driver,) = hosts.head.processes(DRIVER)
    os.kill(driver, signal.SIGKILL)
    result = killed.wait(60)
    assert result.code != 0
    epochs.append(epochs_of(result.text))

    epochs.append(epochs_of(hosts.submit(*arguments).text))
    for before, after in pairwise(epochs):
        assert after[0] > before[-1], f"the training starts again: {epochs}"
    assert [epoch["epoch"] for epoch in manifest(hosts, "train", "killed")["output"]["history"]] == list(range(1, 31))


def test_an_object_store_instead_of_the_folder(hosts: Hosts, tmp_path: Path) -> None:
    with served(hosts, tmp_path) as (store, tracking):
        uri = store.uri.replace("?", "/hosts?")
        places = ("--storage", f"'{uri}'", "--tracking.uri", tracking.uri)
        result = hosts.submit(*SMALL, "--train.epochs", "20", *places)
        assert "models:/perceiver/1" in result.text
        again = hosts.submit(*SMALL, "--train.epochs", "20", *places)
        assert len(re.findall(r"\d s +\w+ +done before", again.text)) == 7


def test_images_in_an_object_store_are_streamed_within_the_window(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(hosts, tmp_path) as (store, tracking):
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        text, beyond, allowed = stream(hosts, store, tracking, SMALL)
    assert "models:/perceiver/1" in text
    print(f"a worker holds {beyond / 1e6:.0f} MB more than with the digits, the formula is {allowed / 1e6:.0f} MB")
    assert 0 < beyond < 1.5 * allowed  # 246 MB and more without streaming; one run differs from another by some 10 MB


def test_down_stops_the_head(hosts: Hosts) -> None:
    hosts.ray("down", "--yes", str(hosts.yaml))
    assert hosts.head.processes("gcs_server") == []
    hosts.seconds["workers end"] = wait_until(
        lambda: not any(host.processes("raylet") for host in hosts.workers), 120, "the raylets end", pause=1
    )
