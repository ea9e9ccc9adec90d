"""A signal stops a run in such a way that the same command continues it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from workshop import PATIENCE, Workshop, wait_for

from pipeline.workflow.runner import StopOnSignal, run_tasks
from pipeline.workflow.task import Context, Stopped, StoppedEarly

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def signal_when(path: Path) -> None:
    """Sends SIGTERM to this process as soon as `path` exists."""

    def wait() -> None:
        wait_for(path)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait).start()


@pytest.mark.usefixtures("ray_cluster")
def test_a_stoppable_task_stops_and_goes_on_later(shop: Workshop) -> None:
    def work(context: Context) -> str:
        if context.storage.exists(f"{context.state}/checkpoint"):
            return "went on"
        context.channel.report({"epoch": 1})
        stop = threading.Event()
        context.channel.on_stop(stop.set)
        (shop.folder / "working").touch()
        assert stop.wait(PATIENCE)
        context.storage.write_bytes(f"{context.state}/checkpoint", b"")
        raise StoppedEarly

    tasks = [shop.task("a"), shop.task("b", "a", work=work, stoppable=True), shop.task("c", "b")]
    before = signal.getsignal(signal.SIGTERM)
    signal_when(shop.folder / "working")
    said: list[str] = []
    with pytest.raises(Stopped) as stopped, StopOnSignal(signal.SIGTERM, signal.SIGINT) as stop:
        run_tasks(shop.plan(tasks), tasks, stop, [shop], say=said.append)
    (line,) = said
    assert line.startswith("stopping: waits up to 180 s for b to save what is done; a second signal ends")
    assert stopped.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert ("reported", {"epoch": 1}) in shop.observed
    assert set(shop.plan(tasks).done()) == {"a"}
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


@pytest.mark.parametrize("look", [1, 2, 3, 4])
@pytest.mark.usefixtures("ray_cluster")
def test_a_signal_that_comes_between_two_tasks_never_passes_for_the_end(shop: Workshop, look: int) -> None:
    class Stop(StopOnSignal):
        """Has received the signal when it is asked for the `look`th time."""

        looks = 0

        @property
        def received(self) -> int | None:
            self.looks += 1
            return signal.SIGTERM if self.looks >= look else None

        @received.setter
        def received(self, _: int | None) -> None: ...

    with pytest.raises(Stopped):
        shop.run([shop.task(name) for name in "abcd"], stop=Stop())


def test_a_second_signal_ends_the_process() -> None:
    code = """if True:
        import signal, time
        from pipeline.workflow.runner import StopOnSignal
        with StopOnSignal(signal.SIGINT, signal.SIGTERM) as stop:
            print("entered", flush=True)
            while not stop.received:
                time.sleep(0.01)
            print(stop.received, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "entered\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{signal.SIGINT.value}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
