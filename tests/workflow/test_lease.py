"""One driver at a time works at a run, and the next one follows when it ends, however it ends."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.storage import Storage
from pipeline.workflow import lease
from pipeline.workflow.lease import Claim, Lease, LeaseLost

ROOT = Path(__file__).parents[2]
HOLD = """if True:
    import sys, time
    from pipeline.workflow.lease import Lease
    from pipeline.storage import Storage
    with Lease(Storage(sys.argv[1]), ["run"], print):
        print("held", flush=True)
        time.sleep(60)
"""


def nobody(key: str, claim: Claim) -> None:
    raise AssertionError(f"waits for {claim} of {key}")


def test_one_at_a_time(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    inside, most, turns, waited_for = 0, 0, [], set()

    def drive(number: int) -> None:
        nonlocal inside, most
        with Lease(storage, ["run"], lambda key, claim: waited_for.add(claim.holds)) as held:
            inside += 1
            most = max(most, inside)
            time.sleep(2 * lease.POLL_SECONDS)
            held.check()
            turns.append(number)
            inside -= 1

    drivers = [threading.Thread(target=drive, args=(number,)) for number in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(30)
    assert sorted(turns) == [0, 1, 2]
    assert most == 1
    assert waited_for == {True}
    assert storage.list("drivers/run") == [], "claims are left behind"


def test_what_runs_share_is_released_before_they_end(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    waited_for, order = set(), []

    def drive() -> None:
        with Lease(storage, ["other run", "train"], lambda key, claim: waited_for.add(key)) as held:
            held.check()
            order.append("other run")

    with Lease(storage, ["run", "train"], nobody) as first:
        other = threading.Thread(target=drive)
        other.start()
        time.sleep(3 * lease.POLL_SECONDS)
        order.append("train is done")
        first.release("train")
        first.release("search")  # not held
        other.join(30)
        order.append("run")
        first.check()
    assert order == ["train is done", "other run", "run"]
    assert waited_for == {"train"}
    assert [storage.list(f"drivers/{key}") for key in ("run", "other run", "train")] == [[], [], []]


def test_a_killed_driver_on_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    storage = Storage(str(tmp_path))
    (left,) = storage.list("drivers/run")
    start = time.monotonic()
    with Lease(storage, ["run"], nobody):
        assert time.monotonic() - start < lease.PATIENCE_SECONDS / 2
        assert left not in storage.list("drivers/run")


def test_a_driver_elsewhere_is_waited_for_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 2.0)
    storage = Storage(str(tmp_path))
    elsewhere = Claim("far", "another machine", 1, "1", holds=True)
    last = 0.0

    def live() -> None:
        nonlocal last
        for beat in range(4):
            storage.write_json("drivers/run/000.json", asdict(replace(elsewhere, beat=beat)))
            last = time.monotonic()
            time.sleep(0.9)

    storage.write_json("drivers/run/000.json", asdict(elsewhere))
    thread = threading.Thread(target=live)
    thread.start()
    hosts = []
    with Lease(storage, ["run"], lambda key, claim: hosts.append(claim.host)):
        thread.join()
        assert time.monotonic() - last >= 2.0
    assert set(hosts) == {"far"}


def test_a_driver_that_was_given_up_finds_that_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    storage = Storage(str(tmp_path))
    with Lease(storage, ["run"], nobody) as held:
        held.check()
        (own,) = {name for name in storage.list("drivers/run") if name.endswith(".json")}
        with held._lock:  # not while it is being renewed, which the next test is about
            storage.delete(f"drivers/run/{own}")  # as the driver does that follows
        time.sleep(0.5)
        with pytest.raises(LeaseLost, match="another driver works at this run"):
            held.check()
    assert storage.list("drivers/run") == []


def test_a_driver_that_is_stopped_while_it_renews_its_claim_finds_out_that_it_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    storage = Storage(str(tmp_path))
    follower, stop, exists = Claim("far", "another machine", 1, "1", holds=True), threading.Event(), storage.exists

    def exists_and_stops(path: str) -> bool:
        """As a process that is stopped between its look at the claim and the next line, until another has followed."""
        found = exists(path)
        if stop.is_set():
            stop.clear()
            storage.write_json("drivers/run/000.json", asdict(follower))
            storage.delete(path)
            time.sleep(2 * lease.BEAT_SECONDS)
        return found

    monkeypatch.setattr(storage, "exists", exists_and_stops)
    with Lease(storage, ["run"], nobody) as held:
        held.check()
        stop.set()
        while stop.is_set() or len(storage.list("drivers/run")) != 1:
            time.sleep(0.05)
        time.sleep(0.5)
        with pytest.raises(LeaseLost, match="another driver works at this run"):
            held.check()
    assert storage.list("drivers/run") == ["000.json"]


def test_a_claim_that_is_put_back_a_moment_after_a_stall_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    storage = Storage(str(tmp_path))
    follower, followed, exists = Claim("far", "another machine", 1, "1", holds=True), threading.Event(), storage.exists

    def exists_and_is_followed(path: str) -> bool:
        """As if another driver followed within the moment between the look at the claim and its renewal."""
        found = exists(path)
        if not followed.is_set():
            followed.set()
            storage.write_json("drivers/run/000.json", asdict(follower))
            storage.delete(path)
        return found

    with Lease(storage, ["run"], nobody) as held:
        with held._lock:
            time.sleep(3 * lease.BEAT_SECONDS)  # the stall, which is over before the look
            monkeypatch.setattr(storage, "exists", exists_and_is_followed)
        assert followed.wait(30)
        with pytest.raises(LeaseLost, match="another driver works at this run"):
            held.check()
    assert storage.list("drivers/run") == ["000.json"]


def test_a_driver_that_stalls_before_it_holds_waits_for_the_one_that_came_to_hold_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, inside, stalled = Storage(str(tmp_path)), threading.Event(), threading.Event()
    waited_for: set[str] = set()

    def drive_first() -> None:
        with Lease(Storage(str(tmp_path)), ["run"], nobody) as other:
            inside.set()
            time.sleep(3 * lease.POLL_SECONDS)
            inside.clear()
            other.check()

    other, write = threading.Thread(target=drive_first), storage.write_json

    def write_after_a_stall(path: str, value: dict[str, object]) -> None:
        """As a process that is stopped between its last look at the claims and the claim that it holds."""
        if value["holds"] and not stalled.is_set():
            stalled.set()
            claim = storage.fs_path(path)
            os.rename(claim, f"{claim}.hidden")  # so that the other one does not wait for this one's smaller id
            other.start()
            assert inside.wait(30)
            os.unlink(f"{claim}.hidden")
        write(path, value)

    monkeypatch.setattr(storage, "write_json", write_after_a_stall)
    with Lease(storage, ["run"], lambda key, claim: waited_for.add(key)) as held:
        assert not inside.is_set(), "two drivers hold the same run"
        held.check()
    other.join(30)
    assert stalled.is_set()
    assert waited_for == {"run"}


def test_a_claim_that_cannot_be_deleted_hides_no_error_and_ends_no_run(tmp_path: Path) -> None:
    class Failing(Storage):
        fails = False

        def delete(self, path: str) -> None:
            if self.fails:
                raise OSError(errno.EIO, "the storage does not answer")
            super().delete(path)

    def drive() -> None:
        with Lease(storage, ["run", "train"], nobody) as held:
            storage.fails = True
            held.release("train")
            raise RuntimeError("what has ended the run")

    storage = Failing(str(tmp_path))
    with pytest.raises(RuntimeError, match="what has ended the run"):
        drive()
