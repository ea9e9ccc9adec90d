"""The Ray Tune actor in which trials run one after another, so that TensorFlow is imported only once.

Tune calls `step` for one epoch at a time, while a training reports each epoch by a callback. Therefore the training
runs in a thread that waits in its callback until Tune has decided whether the trial continues.
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
from tune.journal import AGAIN, OBJECTIVE, SCORE, Journal, score
from tune.space import Sample

# Time for a training on several workers to write a checkpoint and stop.
STOP_TIMEOUT_SECONDS = 180.0
MEMORY_POLL_SECONDS = 0.1
ENDED = {"done": True, "ended": True}  # `done` alone is not enough: Tune also sets it when it stops a trial


class Report(Protocol):
    """Takes the metrics of an epoch, which include `epoch`, `val_accuracy` and `seconds`.

    With `again`, the trial had completed the epoch before it was cut off: it is recorded, and stops no trial.
    """

    def __call__(self, metrics: Mapping[str, Any], *, again: bool = False) -> None: ...


class TrainTrial(Protocol):
    """Trains one sample, in the calling process or on workers that it starts.

    Args:
        sample: values of the searched dimensions.
        trial: name of the trial. One that was cut off continues from its checkpoint, and first reports the epochs that
            it has completed once more, as `again`.
        report: called with the metrics of each epoch.

    Raises:
        TrialStopped: by `report`, if the trial is stopped early; it must be passed on.
    """

    def __call__(self, sample: Sample, *, trial: str, report: Report) -> None: ...


class TrialStopped(BaseException):
    """Raised in the training thread when Tune has stopped the trial. No `except Exception` catches it."""


class TrialProcess(ray.tune.Trainable):
    """Runs one trial after another, if Tune has `reuse_actors`.

    The config of a trial holds its name as `trial`, its sample as `values`, and its `gflops`. A result holds the
    reported `metrics`, `epoch` and `score`, and whether the epoch was reported `again`. The last result of a training
    that was not stopped by Tune has `ended`, and `error` if it failed.
    """

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], train_trial: TrainTrial, journal: Journal, settings: SearchConfig
    ) -> None:
        self._train_trial, self._journal, self._settings = train_trial, journal, settings
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
        self._training.stop()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._training.stop()

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial, self._gflops = config["trial"], config["gflops"]
        if error := self._journal.death(self._trial):  # the process before this one exceeded its memory
            self._training: _TrainingThread | _FailedTraining = _FailedTraining(error)
        else:
            self._training = _TrainingThread(self._train_trial, config["values"], self._trial, self._journal.mask)

    def _watch_memory(self, limit_gib: float) -> None:
        """Kills this process when it exceeds its memory limit, before the kernel kills another one."""
        page_gib = os.sysconf("SC_PAGE_SIZE") / 2**30
        waiting = threading.Event()
        while (used := page_gib * int(Path("/proc/self/statm").read_text().split()[1])) <= limit_gib:
            waiting.wait(MEMORY_POLL_SECONDS)
        error = f"MemoryError: the trial's process has {used:.2f} GiB, search.memory_limit_gib = {limit_gib:g}"
        self._journal.write_death(self._trial, error)
        os.kill(os.getpid(), signal.SIGKILL)  # sys.exit would leave the training thread running


class _FailedTraining:
    """Stands in for a training that must not be tried again."""

    def __init__(self, error: str) -> None:
        self._error = error

    def next(self) -> dict[str, Any]:
        return {**ENDED, "error": self._error}

    def stop(self) -> None:
        pass


class _TrainingThread:
    """A training in its own thread, which alternates with the thread that asks for epochs."""

    def __init__(self, train_trial: TrainTrial, sample: Sample, trial: str, mask: Callable[[str], str]) -> None:
        self._mask = mask
        self._results: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._turn = threading.Semaphore(0)
        self._stopped = False
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, args=(train_trial, sample, trial), daemon=True, name=trial)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The result of the next epoch; after the last epoch, its result again with `ended`."""
        self._turn.release()
        return self._results.get()

    def stop(self) -> None:
        """Stops the training at its next report, and waits for the thread to end.

        Raises:
            TimeoutError: if the thread does not end; Tune then kills this process.
        """
        self._stopped = True
        self._turn.release()
        self._thread.join(STOP_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} has not ended {STOP_TIMEOUT_SECONDS} s after it was stopped")

    def _run(self, train_trial: TrainTrial, sample: Sample, trial: str) -> None:
        self._turn.acquire()
        if self._stopped:
            return
        try:
            train_trial(sample, trial=trial, report=self._report)
        except TrialStopped:
            return
        except Exception as error:
            self._results.put({**self._last, **ENDED, "error": self._mask(one_line(error))})
        else:
            self._results.put({**self._last, **ENDED})

    def _report(self, metrics: Mapping[str, Any], *, again: bool = False) -> None:
        self._last = {"metrics": dict(metrics), AGAIN: again}
        self._results.put(dict(self._last))
        self._turn.acquire()
        if self._stopped:
            raise TrialStopped


def one_line(error: BaseException) -> str:
    """Type and first line of an error, without the traceback that Ray adds."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".strip().split("\n")[0]
