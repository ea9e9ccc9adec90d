"""The durable tasks, with small ones of their own on a real Ray: skipped, retried, forgotten, stopped and killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.board import Board
from pipeline.config import PipelineConfig
from pipeline.lease import LeaseLost
from pipeline.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks import TASKS
from pipeline.workflow import (
    Context,
    Manifest,
    StopOnSignal,
    Stopped,
    StoppedEarly,
    Task,
    TaskFailed,
    done,
    following,
    forget,
    run_identity,
    run_tasks,
    task_keys,
)

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

CONFIG = quickstart()
PATIENCE = 60.0


def changed(section: str, **changes: Any) -> PipelineConfig:
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **changes)})


def wait_until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path} does not appear")


class Workshop:
    """A storage, tasks that leave a line in a file of their name whenever they run, and what a driver observes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "runs"))
        self.observed: list[tuple[str, Any]] = []

    def task(self, name: str, *inputs: str, work: Callable[[Context], Any] = lambda context: None, **more: Any) -> Task:
        folder = self.folder

        def run(context: Context) -> dict[str, Any]:
            with open(folder / name, "a") as file:
                file.write(f"{os.getpid()}\n")
            return {"result": work(context), "from": {key: value["result"] for key, value in context.inputs.items()}}

        section: Callable[[PipelineConfig], dict[str, Any]] = lambda config: {"seed": config.data.seed}  # noqa: E731
        return Task(name, 1, inputs, section, run, lambda config: "nothing", **more)

    def executions(self, *names: str) -> list[int]:
        paths = [self.folder / name for name in names]
        return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]

    def run(
        self, tasks: Sequence[Task], config: PipelineConfig = CONFIG, stop: StopOnSignal | None = None
    ) -> dict[str, Manifest]:
        return run_tasks(tasks, config, self.storage, "identity", stop or StopOnSignal(), [self])

    def started(self, task: str) -> None:
        self.observed.append(("started", task))

    def event(self, event: dict[str, Any]) -> None:
        self.observed.append(("event", event))

    def done(self, task: str, manifest: Manifest) -> None:
        self.observed.append(("done", task))


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def chain(shop: Workshop) -> list[Task]:
    return [shop.task("a"), shop.task("b", "a"), shop.task("c", "b")]


def test_a_key_depends_on_name_version_section_and_inputs(shop: Workshop) -> None:
    a, b, c = chain(shop)
    keys = task_keys([a, b, c], CONFIG)
    assert keys == task_keys(chain(shop), CONFIG)
    assert len({*keys.values(), *task_keys([replace(a, name="d")], CONFIG).values()}) == 4

    def changed_keys(tasks: Sequence[Task], config: PipelineConfig = CONFIG) -> set[str]:
        return {name for name, key in task_keys(tasks, config).items() if key != keys[name]}

    assert changed_keys([a, replace(b, version=2), c]) == {"b", "c"}
    assert changed_keys([a, b, replace(c, inputs=("a", "b"))]) == {"c"}
    assert changed_keys([a, b, c], changed("data", seed=1)) == {"a", "b", "c"}
    assert changed_keys([replace(a, section=lambda config: {}), b, c]) == {"a", "b", "c"}
    assert changed_keys([a, b, c], changed("train", seed=1)) == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (changed("train", num_workers=1, cpus_per_worker=0.5, use_gpu=True, max_failures=0), set()),
        (changed("search", cpus_per_trial=0.5), set()),
        (changed("tracking", uri="sqlite:////elsewhere.db", experiment="e", model_name="m", alias="a"), set()),
        (replace(CONFIG, storage="/elsewhere"), set()),
        (changed("train", learning_rate=1e-3), {"search", "train", "evaluate", "register", "report"}),
        (changed("search", epochs=2), {"search", "train", "evaluate", "register", "report"}),
        (changed("data", num_shards=17), {"preprocess", "search", "train", "evaluate", "register", "report"}),
        (changed("data", seed=1), {task.name for task in TASKS}),
    ],
)
def test_settings_change_the_keys_of_what_depends_on_them(config: PipelineConfig, expected: set[str]) -> None:
    before, after = task_keys(TASKS, CONFIG), task_keys(TASKS, config)
    assert {name for name in before if before[name] != after[name]} == expected


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_done_is_not_run_again(shop: Workshop) -> None:
    tasks = [
        shop.task("a", work=lambda context: 1),
        shop.task("b", "a", work=lambda context: context.inputs["a"]["result"] + 1),
    ]
    assert done(tasks, CONFIG, shop.storage) == {}
    first = shop.run(tasks)
    assert first["b"]["output"] == {"result": 2, "from": {"a": 1}}
    assert first["b"]["key"] == task_keys(tasks, CONFIG)["b"]
    assert first["b"]["inputs"] == {"a": first["a"]["key"]}
    assert shop.observed == [("started", "a"), ("done", "a"), ("started", "b"), ("done", "b")]
    assert shop.run(tasks) == first == done(tasks, CONFIG, shop.storage)
    shop.run(tasks, changed("train", num_workers=1))
    assert shop.executions("a", "b") == [1, 1]
    shop.run([tasks[0], replace(tasks[1], version=2)])
    assert shop.executions("a", "b") == [1, 2]


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
    assert set(done(tasks, CONFIG, shop.storage)) == {"a", "c"}
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
            actor: Any = ray.remote(num_cpus=0)(Suicidal).remote()  # a trainer's, say
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
    """What a driver process of the next test does: b waits until somebody lets it go on."""
    shop = Workshop(folder)
    ray.init(address=address, log_to_driver=False)
    shop.run(
        [shop.task("a"), shop.task("b", "a", work=lambda context: wait_for(folder / "go on")), shop.task("c", "b")]
    )


@pytest.mark.usefixtures("ray_cluster")
def test_another_driver_goes_on_after_one_was_killed(shop: Workshop) -> None:
    code = "import sys, pathlib, test_workflow; test_workflow.drive(pathlib.Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(shop.folder), ray.get_runtime_context().gcs_address]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    first = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    wait_for(shop.folder / "b")
    first.kill()
    first.wait()
    # Ray ends the processes of a dead driver a moment later; until then b could end well, and rightly count as done.
    pid = int((shop.folder / "b").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "b outlives its driver")
    (shop.folder / "go on").touch()
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=PATIENCE)
    assert shop.executions("a", "b", "c") == [1, 2, 1]


@pytest.mark.usefixtures("ray_cluster")
def test_what_an_orphan_leaves_counts_for_nothing_and_harms_nobody(shop: Workshop) -> None:
    task = shop.task("a", work=lambda context: context.storage.write_bytes(f"{context.out}/part", b""))
    home = f"tasks/a/{task_keys([task], CONFIG)['a']}"
    orphan = run_tasks([task], CONFIG, shop.storage, "identity", StopOnSignal(), [])["a"]["attempt"]
    shop.storage.delete(f"{home}/manifest.json")  # its driver was killed before the commit
    shop.storage.write_bytes(f"{home}/attempt-00000000-1/part", b"")  # of another run, which may go on
    manifest = shop.run([task])["a"]
    assert manifest["attempt"] != orphan
    assert shop.storage.list(home) == sorted(["attempt-00000000-1", manifest["attempt"], "manifest.json"])
    assert shop.storage.list(f"{home}/{manifest['attempt']}") == ["part"]


@pytest.mark.usefixtures("ray_cluster")
def test_of_two_runs_with_a_task_in_common_the_quicker_one_commits(shop: Workshop) -> None:
    ours, theirs = shop.task("a", work=lambda context: "ours"), shop.task("a", work=lambda context: "theirs")

    def meanwhile() -> None:
        theirs_done.update(run_tasks([theirs], CONFIG, shop.storage, "their run", StopOnSignal(), []))

    theirs_done: dict[str, Manifest] = {}
    ours_done = run_tasks([ours], CONFIG, shop.storage, "our run", StopOnSignal(), [], meanwhile)
    assert ours_done == theirs_done == done([ours], CONFIG, shop.storage)
    assert ours_done["a"]["output"]["result"] == "theirs"
    assert shop.storage.list(f"tasks/a/{ours_done['a']['key']}") == ["manifest.json"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_that_has_lost_the_run_commits_nothing(shop: Workshop) -> None:
    def fence() -> None:
        raise LeaseLost("gone")

    tasks = chain(shop)
    with pytest.raises(LeaseLost):
        run_tasks(tasks, CONFIG, shop.storage, "identity", StopOnSignal(), [shop], fence)
    assert done(tasks, CONFIG, shop.storage) == {}
    assert shop.observed == [("started", "a")]


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_forgotten_runs_again_with_all_that_follows(shop: Workshop) -> None:
    def work(context: Context) -> bool:
        known = context.storage.exists(f"{context.state}/known")
        context.storage.write_bytes(f"{context.state}/known", b"")
        return known

    tasks = [shop.task("a"), shop.task("b", "a", work=work), shop.task("c", "b"), shop.task("d", "a")]
    shop.run(tasks)
    identity = run_identity(tasks, CONFIG, shop.storage)
    assert following(tasks, ["b"]) == {"b", "c"}
    assert following(tasks, ["c", "d"]) == {"c", "d"}
    forget(tasks, following(tasks, ["b"]), CONFIG, shop.storage)
    assert set(done(tasks, CONFIG, shop.storage)) == {"a", "d"}
    assert shop.run(tasks)["b"]["output"]["result"] is False, "the state is forgotten too"
    assert shop.executions("a", "b", "c", "d") == [1, 2, 2, 1]
    assert run_identity(tasks, CONFIG, shop.storage) != identity
    forget(tasks, ["c"], changed("data", seed=1), shop.storage)  # never done with these settings: no error


def test_a_run_keeps_its_identity(shop: Workshop) -> None:
    tasks = chain(shop)
    identity = run_identity(tasks, CONFIG, shop.storage)
    assert run_identity(chain(shop), changed("train", num_workers=1), Storage(shop.storage.uri)) == identity
    assert run_identity(tasks, changed("data", seed=1), shop.storage) != identity
    forget(tasks, [], CONFIG, shop.storage)
    assert run_identity(tasks, CONFIG, shop.storage) != identity


@pytest.mark.usefixtures("ray_cluster")
def test_an_output_that_is_not_current_is_made_again(shop: Workshop) -> None:
    tasks = [
        shop.task("a"),
        shop.task(
            "b",
            "a",
            work=lambda context: context.config.tracking.alias,
            is_current=lambda config, output: output["result"] == config.tracking.alias,
        ),
        shop.task("c", "b"),
    ]
    shop.run(tasks)
    other = changed("tracking", alias="other")
    assert set(done(tasks, other, shop.storage)) == {"a"}
    manifest = shop.run(tasks, other)["b"]
    assert manifest["output"]["result"] == "other"
    assert shop.executions("a", "b", "c") == [1, 2, 2]
    assert shop.storage.list(f"tasks/b/{manifest['key']}") == ["manifest.json"]


@pytest.mark.usefixtures("ray_cluster")
def test_the_board_outlives_its_process() -> None:
    board, stopped, events = Board(), threading.Event(), []
    board.on_stop(stopped.set)
    os.kill(ray.get(board._actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    board.post(number=1)
    deadline = time.monotonic() + PATIENCE
    while not (events := board.take()):
        assert time.monotonic() < deadline
    assert events == [{"number": 1}]
    board.request_stop()
    assert stopped.wait(PATIENCE)


def signal_when(path: Path) -> None:
    """Sends this process SIGTERM as soon as `path` is there."""

    def wait() -> None:
        wait_for(path)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait).start()


@pytest.mark.usefixtures("ray_cluster")
def test_a_stoppable_task_stops_and_goes_on_later(shop: Workshop) -> None:
    def work(context: Context) -> str:
        if context.storage.exists(f"{context.state}/checkpoint"):
            return "went on"
        context.board.post(epoch=1)
        stop = threading.Event()
        context.board.on_stop(stop.set)
        (shop.folder / "working").touch()
        assert stop.wait(PATIENCE)
        context.storage.write_bytes(f"{context.state}/checkpoint", b"")
        raise StoppedEarly

    tasks = [shop.task("a"), shop.task("b", "a", work=work, stoppable=True), shop.task("c", "b")]
    before = signal.getsignal(signal.SIGTERM)
    signal_when(shop.folder / "working")
    with pytest.raises(Stopped) as stopped, StopOnSignal(signal.SIGTERM, signal.SIGINT) as stop:
        shop.run(tasks, stop=stop)
    assert stopped.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert ("event", {"epoch": 1}) in shop.observed
    assert set(done(tasks, CONFIG, shop.storage)) == {"a"}
    assert shop.run(tasks)["b"]["output"]["result"] == "went on"
    assert shop.executions("a", "b", "c") == [1, 2, 1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_that_cannot_stop_is_left(shop: Workshop) -> None:
    tasks = [shop.task("a", work=lambda context: wait_for(shop.folder / "go on")), shop.task("b", "a")]
    signal_when(shop.folder / "a")
    start = time.monotonic()
    with pytest.raises(Stopped), StopOnSignal(signal.SIGTERM) as stop:
        shop.run(tasks, stop=stop)
    assert time.monotonic() - start < PATIENCE / 2
    assert shop.executions("b") == [0]
    (shop.folder / "go on").touch()


def test_a_second_signal_ends_the_process() -> None:
    code = """if True:
        import signal, time
        from pipeline.workflow import StopOnSignal
        with StopOnSignal(signal.SIGINT, signal.SIGTERM) as stop:
            print("entered", flush=True)
            while not stop.received:
                time.sleep(0.01)
            print(stop.received, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "entered\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{signal.SIGINT.value}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
