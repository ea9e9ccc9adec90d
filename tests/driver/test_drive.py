"""What a command does before its first task and after its last one, without Ray."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.driver.drive import _copy_report, execute
from pipeline.settings.command_line import Options
from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.lease import Lease
from pipeline.workflow.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run[PipelineConfig]:
    return Run(TASKS, replace(quickstart(), storage=str(tmp_path)), Storage(str(tmp_path)))


def commit(run: Run[PipelineConfig], task: str, output: dict[str, object]) -> None:
    """Writes the manifest of a task as if it were done."""
    about = {"task": task, "key": run.keys[task], "attempt": "attempt-1", "inputs": {}, "seconds": 1.0}
    run.storage.write_json(run.manifest_path(task), about | {"output": output})


def test_a_task_beyond_the_last_one_is_not_forgotten_while_another_driver_works_at_it(
    run: Run[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    commit(run, "ingest", {})
    checkpoint = f"{run.home('train')}/state/checkpoints/1/arrays.npz"
    run.storage.write_bytes(checkpoint, b"")
    options = Options(config=run.config, until="ingest", force=("train",))
    said: list[str] = []
    with Lease(run.storage, ["another run", run.keys["train"]], lambda key, claim: None) as other:
        command = threading.Thread(target=lambda: execute("quickstart", options, run))
        command.start()
        while "works at the same train for another run: waiting for it" not in " ".join(said):
            assert command.is_alive(), "it does not wait"
            said.append(capsys.readouterr().out)
        assert run.storage.exists(checkpoint)
        other.release(run.keys["train"])
        command.join(60)
        assert not run.storage.exists(checkpoint)


def test_a_report_that_cannot_be_copied_is_shown_where_it_lies(
    run: Run[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    own = run.storage.write_verified(f"{run.home('report')}/attempt-1/report.html", b"of this run")
    commit(run, "report", {"report": own})
    assert _copy_report(run) == run.storage.absolute("report.html")
    assert run.storage.read_bytes("report.html") == b"of this run"
    run.storage.delete("report.html")
    run.storage.write_bytes("report.html/file", b"a folder, which cannot be replaced by a file")
    assert _copy_report(run) == run.storage.absolute(own["path"])
    assert "warning: the report is not copied to" in capsys.readouterr().err
