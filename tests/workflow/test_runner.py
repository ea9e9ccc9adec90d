"""The runner executes tasks on Ray, in parallel, and continues after failures, killed processes and killed drivers."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from workshop import PATIENCE, Workshop, chain, wait_for, wait_until

from pipeline.storage import Storage
from pipeline.workflow.lease import LeaseLost
from pipeline.workflow.runner import StopOnSignal, _attempts_of, run_tasks
from pipeline.workflow.task import Context, Manifest, Task, TaskFailed

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.mark.usefixtures("ray_cluster")
def test_independent_tasks_run_at_the_same_time(shop: Workshop) -> None:
    def meet(other: str) -> Callable[[Context], None]:
        return lambda context: wait_for(shop.folder / other)

    shop.run([shop.task("a"), shop.task("b", "a", work=meet("c")), shop.task("c", "a", work=meet("b"))])


@pytest.mark.usefixtures("ray_cluster")
def test_after_a_failure_the_others_end_and_a_rerun_goes_on(shop: Workshop) -> None:
    def fail(context: Context) -> None:
        if not (shop.folder / "mended").exists():
            raise ValueError("this image is no image")

    def outlast(context: Context) -> None:
        wait_for(shop.folder / "b")
        time.sleep(0.5)

    tasks = [shop.task("a"), shop.task("b", "a", work=fail), shop.task("c", "a", work=outlast), shop.task("d", "b")]
    with pytest.raises(TaskFailed, match="b: this image is no image") as raised:
        shop.run(tasks)
    assert raised.value.task == "b"
    assert type(raised.value.cause) is ValueError
    assert "in fail" in str(raised.value.__cause__), "the traceback of the worker is lost"
    assert set(shop.plan(tasks).done()) == {"a", "c"}
    (shop.folder / "mended").touch()
    assert set(shop.run(tasks)) == {"a", "b", "c", "d"}
    assert shop.executions("a", "b", "c", "d") == [1, 2, 1, 1]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("victim", ["task", "actor"])
def test_an_attempt_whose_process_is_killed_is_repeated(shop: Workshop, victim: str) -> None:
    def work(context: Context) -> str:
        context.storage.write_bytes(f"{context.out}/part", b"")
        context.storage.write_bytes(f"{context.state}/{Path(context.out).name}", b"")
        if len(context.storage.list(context.state)) == 1:
            if victim == "task":
                os.kill(os.getpid(), signal.SIGKILL)
            actor: Any = ray.remote(num_cpus=0)(Suicidal).remote()  # as the controller of a trainer
            ray.get(actor.end.remote())
        return context.out

    tasks = [shop.task("a"), shop.task("b", "a", work=work)]
    manifest = shop.run(tasks)["b"]
    assert shop.executions("a", "b") == [1, 2]
    home = f"tasks/b/{manifest['key']}"
    assert manifest["output"]["result"] == f"{home}/{manifest['attempt']}"
    assert shop.storage.list(home) == [manifest["attempt"], "manifest.json", "state"]
    assert len(shop.storage.list(f"{home}/state")) == 2, "the state outlives the attempt"


class Suicidal:
    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def drive(folder: Path, address: str) -> None:
    """The driver process of the next test. Task b waits for the file `go on`."""
    shop = Workshop(folder)
    ray.init(address=address, log_to_driver=False)
    shop.run(
        [shop.task("a"), shop.task("b", "a", work=lambda context: wait_for(folder / "go on")), shop.task("c", "b")]
    )


@pytest.mark.usefixtures("ray_cluster")
def test_another_driver_goes_on_after_one_was_killed(shop: Workshop) -> None:
    code = "import sys, pathlib, test_runner; test_runner.drive(pathlib.Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(shop.folder), ray.get_runtime_context().gcs_address]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    first = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    wait_for(shop.folder / "b")
    first.kill()
    first.wait()
    # Ray ends the processes of a dead driver a moment later. Until then b could end and rightly count as done.
    pid = int((shop.folder / "b").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "b outlives its driver")
    (shop.folder / "go on").touch()
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=PATIENCE)
    assert shop.executions("a", "b", "c") == [1, 2, 1]


@pytest.mark.usefixtures("ray_cluster")
def test_what_an_orphan_leaves_counts_for_nothing_and_harms_nobody(shop: Workshop) -> None:
    task = shop.task("a", work=lambda context: context.storage.write_bytes(f"{context.out}/part", b""))
    home = f"tasks/a/{shop.plan([task]).keys['a']}"
    orphan = shop.run([task])["a"]["attempt"]
    shop.storage.delete(f"{home}/manifest.json")  # its driver was killed before the commit
    shop.storage.write_bytes(f"{home}/attempt-00000000-1/part", b"")  # of another run, which may go on
    manifest = shop.run([task])["a"]
    assert manifest["attempt"] != orphan
    assert shop.storage.list(home) == sorted(["attempt-00000000-1", manifest["attempt"], "manifest.json"])
    assert shop.storage.list(f"{home}/{manifest['attempt']}") == ["part"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_an_attempt_has_left_and_nobody_can_delete_ends_no_run(shop: Workshop) -> None:
    class Failing(Storage):
        """As a folder on NFS in which a process that is gone has a file open."""

        def delete(self, path: str) -> None:
            if path.endswith("left"):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
            super().delete(path)

    shop.storage = Failing(shop.storage.uri)
    tasks = [shop.task("a"), shop.task("b", "a")]
    run = shop.plan(tasks)
    left = f"{run.home('a')}/{_attempts_of(run.identity())}left"
    shop.storage.write_bytes(f"{left}/part", b"")
    assert set(shop.run(tasks)) == {"a", "b"}
    assert shop.storage.exists(left)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("has_stale_output", [False, True])
def test_of_two_runs_with_a_task_in_common_the_quicker_one_commits(shop: Workshop, has_stale_output: bool) -> None:
    def task(result: str) -> Task:
        return shop.task("a", work=lambda context: result, is_current=lambda config, output: output["result"] != "old")

    def meanwhile() -> None:
        theirs_done.update(run_tasks(shop.plan([theirs, shop.task("b")]), [theirs], StopOnSignal(), []))

    ours, theirs = task("ours"), task("theirs")
    if has_stale_output:
        shop.run([task("old")])
    theirs_done: dict[str, Manifest] = {}
    ours_done = run_tasks(shop.plan([ours, shop.task("c")]), [ours], StopOnSignal(), [], meanwhile)
    assert ours_done == theirs_done == shop.plan([ours]).done()
    assert ours_done["a"]["output"]["result"] == "theirs"
    assert shop.storage.list(f"tasks/a/{ours_done['a']['key']}") == ["manifest.json"]


@pytest.mark.usefixtures("ray_cluster")
def test_an_old_output_that_comes_to_count_again_is_that_of_no_quicker_run(shop: Workshop) -> None:
    """As a registry that said that a version is deleted, and does not answer when the next one is committed."""
    silent = shop.folder / "silent"
    tasks = [shop.task("a", work=lambda context: context.out, is_current=lambda config, output: silent.exists())]
    old = shop.run(tasks)["a"]
    new = run_tasks(shop.plan(tasks), tasks, StopOnSignal(), [], silent.touch)["a"]
    assert new["output"] != old["output"]
    assert shop.plan(tasks).done() == {"a": new}


@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_that_has_lost_the_run_commits_nothing(shop: Workshop) -> None:
    def fence() -> None:
        raise LeaseLost("gone")

    tasks = chain(shop)
    with pytest.raises(LeaseLost):
        run_tasks(shop.plan(tasks), tasks, StopOnSignal(), [shop], fence)
    assert shop.plan(tasks).done() == {}
    assert shop.observed == [("started", "a")]
