"""What a crash leaves in the folder of an outbox neither blocks the records that can be read nor goes unsaid."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from test_sender import PROJECT, epoch, history, sender_to

from pipeline.storage import Storage
from pipeline.tracking.outbox import Outbox, Record, has_waiting


def test_a_truncated_record_does_not_block_the_others(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    outbox = Outbox(storage, "torn")
    for number in (1, 2, 3):
        outbox.record(epoch(number))
    path = tmp_path / "tracking" / "torn" / "000000001.json"
    path.write_text(path.read_text()[:40])
    again = Outbox(storage, "torn")
    assert len(again) == 2
    again.record(epoch(4))
    steps = []
    while (record := again.first()) is not None:
        steps.append(record.history[0]["epoch"])
        again.remove_first()
    assert steps == [1, 3, 4]
    assert os.listdir(tmp_path / "tracking" / "torn" / "refused") == ["000000001.json"]


def test_a_truncated_record_is_reported_once(tmp_path: Path) -> None:
    store, storage = f"sqlite:///{tmp_path}/mlflow.db", Storage(str(tmp_path))
    outbox = Outbox(storage, "torn")
    for number in (1, 2):
        outbox.record(epoch(number))
    path = tmp_path / "tracking" / "torn" / "000000000.json"
    path.write_text(path.read_text()[:40])
    unsent = sender_to(store, storage, "torn").close(60)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused, unsent.unreadable) == (0, 0, 1)
    assert str(unsent) == (
        "1 records that an earlier driver had left could not be read, as after a crash of its host; what is left of "
        f"them lies in {tmp_path}/tracking/torn/refused"
    )
    assert history(store, "torn") == [(2, 0.5)]
    assert sender_to(store, storage, "torn").close(60) is None


def test_a_driver_that_is_killed_while_it_sets_a_record_aside_blocks_no_later_one(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pipeline.storage import Storage
        from pipeline.tracking.outbox import Outbox, Record
        outbox = Outbox(Storage(sys.argv[1]), "killed")
        outbox.record(Record("train", metrics={"loss*": 1.0}))
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # written, and not renamed yet
        outbox.refuse_first()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    result = subprocess.run(command, cwd=PROJECT, check=False, timeout=60)
    assert result.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path / "tracking" / "killed" / "refused")
    assert left.endswith(".tmp")
    storage = Storage(str(tmp_path))
    assert has_waiting(storage, "killed")
    sender = sender_to(f"sqlite:///{tmp_path}/mlflow.db", storage, "killed")
    sender.record(Record("train", metrics={"loss": 1.0}))
    unsent = sender.close(60)
    assert unsent is not None
    assert (unsent.waiting, unsent.refused, unsent.unreadable) == (0, 1, 0)
    assert not has_waiting(storage, "killed")
