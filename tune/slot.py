"""The process in which trials run one after another, as Ray Tune sees it.

Tune asks a trial for one epoch after the other; a training calls back after each. So the training has a thread, which
waits in its report until Tune has decided whether it goes on. The process is kept for the next trial: TensorFlow is
imported once.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import ray.tune

from tune.config import SearchConfig
from tune.space import Sample
from tune.trials import OBJECTIVE, SCORE, Journal, score

Report = Callable[[Mapping[str, Any]], None]
# Several workers leave a checkpoint first.
END_SECONDS = 180.0
WATCH_SECONDS = 0.1
ENDED = {"done": True, "ended": True}  # Tune sets `done` also where it ends a trial


class TrialDriver(Protocol):
    """Trains one sample in the calling process, or on workers that it starts.

    It reports the metrics of each epoch, `epoch`, `val_accuracy` and `seconds` among them. `trial` names the trial: one
    that was cut off goes on from where it was, and first reports the epochs that are over once more.

    Raises:
        TrialStopped: passed on from `report`, where the trial is stopped early.
    """

    def __call__(self, sample: Sample, *, trial: str, report: Report) -> None: ...


class TrialStopped(BaseException):
    """Raised in the training's thread when Tune has stopped the trial. No Exception, so that no handler takes it."""


class Slot(ray.tune.Trainable):
    """Runs a trial, then the next one, when Tune has `reuse_actors`.

    The config of a trial is its name as `trial`, its sample as `values` and its `gflops`. A result has what the driver
    reported as `metrics`, and beside it `epoch` and `score`; the last one of a training that came to its end by itself
    has `ended`, and `error` if it failed.
    """

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], driver: TrialDriver, journal: Journal, settings: SearchConfig
    ) -> None:
        self._driver, self._journal, self._settings = driver, journal, settings
        self._begin(config)
        if (limit := settings.memory_limit_gib) is not None:
            threading.Thread(target=self._watch_memory, args=(limit,), daemon=True).start()

    def step(self) -> dict[str, Any]:
        result = self._training.next()
        if metrics := result.get("metrics"):
            value = score(metrics[OBJECTIVE], self._gflops, self._settings)
            result |= {"epoch": metrics["epoch"], SCORE: value}
        return result

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._training.end()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._training.end()

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial, self._gflops = config["trial"], config["gflops"]
        if error := self._journal.death(self._trial):  # of the process before this one
            self._training: _Training | _Ended = _Ended(error)
        else:
            self._training = _Training(self._driver, config["values"], self._trial)

    def _watch_memory(self, limit_gib: float) -> None:
        """Ends this process, with a note why, before the kernel ends another one."""
        page_gib = os.sysconf("SC_PAGE_SIZE") / 2**30
        waiting = threading.Event()
        while (used := page_gib * int(Path("/proc/self/statm").read_text().split()[1])) <= limit_gib:
            waiting.wait(WATCH_SECONDS)
        error = f"MemoryError: the trial's process has {used:.2f} GiB, search.memory_limit_gib = {limit_gib:g}"
        self._journal.note_death(self._trial, error)
        os.kill(os.getpid(), signal.SIGKILL)  # not sys.exit: the training's thread would go on


class _Ended:
    """A trial that must not be tried again."""

    def __init__(self, error: str) -> None:
        self._error = error

    def next(self) -> dict[str, Any]:
        return {**ENDED, "error": self._error}

    def end(self) -> None:
        pass


class _Training:
    """A training on a thread of its own, which takes turns with the thread that asks for epochs."""

    def __init__(self, driver: TrialDriver, sample: Sample, trial: str) -> None:
        self._results: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._turn = threading.Semaphore(0)
        self._stopped = False
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(driver, sample, trial), daemon=True, name=trial)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The result of the next epoch, or that of the last one again with `ended`."""
        self._turn.release()
        return self._results.get()

    def end(self) -> None:
        """Ends the training at its report, and waits for that.

        Raises:
            TimeoutError: if it goes on all the same: Tune then ends this process.
        """
        self._stopped = True
        self._turn.release()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} has not ended {END_SECONDS} s after it was stopped")

    def _run(self, driver: TrialDriver, sample: Sample, trial: str) -> None:
        self._turn.acquire()
        if self._stopped:
            return
        try:
            driver(sample, trial=trial, report=self._report)
        except TrialStopped:
            return
        except Exception as error:
            self._results.put({**self._last, **ENDED, "error": one_line(error)})
        else:
            self._results.put({**self._last, **ENDED})

    def _report(self, metrics: Mapping[str, Any]) -> None:
        self._last = {"metrics": dict(metrics)}
        self._results.put(dict(self._last))
        self._turn.acquire()
        if self._stopped:
            raise TrialStopped


def one_line(error: BaseException) -> str:
    """What was raised, without Ray's traceback around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".strip().split("\n")[0]
