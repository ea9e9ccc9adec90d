"""Ends a call in which this worker would wait for ever, because another worker is somewhere else."""

import atexit
import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from .iterators import BackgroundReleased
from .keras_internals import EpochIterator, replaced, tf_context

PERIOD = 1.0  # seconds between two looks at this worker's state
PATIENCE = 3.0  # seconds in one operation after which this worker looks where the others are
AWAY = 4.0  # seconds for which another worker must be away; it may have been a little faster
_KEY = "keras_multiworker/worker"
_RETURNED = "has returned from"
SUM_OF_METRIC = "the sum of a metric, for its result()"


@dataclass(frozen=True)
class _State:
    """Where a worker is.

    Attributes:
        number: Number of its calls of `fit`, `evaluate` and so on; it is the same on all workers that keep together.
        name: Name of the last call.
        end: How that call ended; empty: it has not.
        operation: Number, within that call, of the operation of all workers in which it has waited for long; 0: none.
        awaited: What that operation is, if it is not one of the call itself.
    """

    number: int = 0
    name: str = ""
    end: str = ""
    operation: int = 0
    awaited: str = ""

    @property
    def text(self) -> str:
        return "\n".join(map(str, (self.number, self.name, self.operation, self.awaited, self.end)))


def rank_of(strategy: tf.distribute.Strategy) -> int:
    """Number of this worker in the order of the replicas; 0 without other workers."""
    resolver = strategy.cluster_resolver
    if resolver is None or strategy.num_replicas_in_sync == 1:
        return 0
    # In a cluster with a chief, the workers' own numbers begin after it.
    jobs = resolver.cluster_spec().as_dict()
    return int(resolver.task_id) + (len(jobs.get("chief", ())) if resolver.task_type == "worker" else 0)


@functools.cache
def guard_of(strategy: tf.distribute.Strategy) -> "Guard":
    """The guard of the workers of a strategy: one, because the calls of all its models are counted together."""
    return Guard(rank_of(strategy), strategy.num_replicas_in_sync)


class Guard:
    """Publishes in which call this worker is, and aborts its collective operations when another worker has left it.

    The workers' states are in the coordination service of TensorFlow, which MultiWorkerMirroredStrategy starts. A slow
    worker is no reason to abort: only one that has left the call in which this worker waits, that is in a call of
    another name, that waits in another operation of the same number, or whose process has ended.

    Args:
        rank: Number of this worker.
        num_workers: Number of workers.
    """

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers
        self._state = _State()
        self._waiting_since: float | None = None
        self._operation, self._awaited = 0, ""
        self._away_since: float | None = None
        self._aborted = ""
        self._started = False
        self._closing, self._closed = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Marks a call of the model that all workers make.

        Raises:
            RuntimeError: if this worker has waited for one that is elsewhere; the message says which and where.
        """
        if self._state.name and not self._state.end:  # within another call
            yield
            return
        if self._aborted:
            raise RuntimeError(self._aborted)
        self._start()
        self._operation = 0
        self._state = _State(self._state.number + 1, name)
        end = _RETURNED
        try:
            yield
        except tf.errors.OpError as error:
            end = _left_with(error)
            message = self._aborted or self._reason_of(error)
            if message:
                raise RuntimeError(message) from None
            raise
        except BaseException as error:
            end = _left_with(error)
            raise
        finally:
            self._state = replace(self._state, end=end)
            if end != _RETURNED or not name.endswith("_on_batch"):  # which is called too often for that
                self._publish(self._state.text)  # at once, because this process may end now

    @contextlib.contextmanager
    def waiting(self, awaited: str = "") -> Iterator[None]:
        """Marks operations that end only when all workers take part.

        Args:
            awaited: What they are, if not a part of the call.
        """
        if self._waiting_since is not None:  # within others
            yield
            return
        self._operation, self._awaited = self._operation + 1, awaited
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = self._away_since = None

    @contextlib.contextmanager
    def waiting_for_batches(self) -> Iterator[None]:
        """Marks the operations by which `predict` takes batches: all workers take part in each."""

        def watched(iterator: Any) -> Iterator[Any]:
            batches = BackgroundReleased(iterator._distributed_dataset)
            while True:
                with self.waiting():
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                yield batch

        with replaced(EpochIterator, "_get_iterator", watched):
            yield

    def _start(self) -> None:
        if self._started or self.num_workers == 1:
            return
        self._started = True
        threading.Thread(target=self._watch, name="multiworker-guard", daemon=True).start()
        atexit.register(self._close)

    def _close(self) -> None:
        """Tells the others that this process ends. If their service has ended before, it does not wait for it."""
        self._closing.set()
        self._closed.wait(2 * PERIOD)

    def _watch(self) -> None:
        published = None
        # When the main thread has ended, the process may still wait for other threads.
        while not self._closing.wait(PERIOD) and threading.main_thread().is_alive():
            state, since = self._state, self._waiting_since
            is_long = since is not None and time.monotonic() - since > PATIENCE
            if is_long:
                state = replace(state, operation=self._operation, awaited=self._awaited)
            if state != published:
                self._publish(state.text)
                published = state
            if is_long:
                self._look_for_others(state)
        if self._state.end == _RETURNED:  # otherwise what is published says more
            self._publish("end of process")
        self._closed.set()

    def _publish(self, text: str) -> None:
        if self.num_workers == 1:
            return
        context, key = tf_context.context(), f"{_KEY}{self.rank}"
        with contextlib.suppress(tf.errors.OpError):  # the first time there is none to delete
            context.delete_config_key_value(key)
        with contextlib.suppress(tf.errors.OpError):  # when the service has ended, nobody waits for this worker
            context.set_config_key_value(key, text)

    def _look_for_others(self, state: _State) -> None:
        away = self._away(state)
        if not away or self._aborted:
            self._away_since = None
            return
        self._away_since = self._away_since or time.monotonic()
        if time.monotonic() - self._away_since < AWAY or self._waiting_since is None:
            return
        self._aborted = self._message(away)
        tf_context.context().abort_collective_ops(tf.errors.ABORTED, self._aborted)

    def _reason_of(self, error: tf.errors.OpError) -> str:
        """Says which worker was away when an operation of all workers failed before this worker had looked for it.

        The operations of two workers that make different calls may not fit together, and TensorFlow may be the first to
        notice that a process has ended.
        """
        if "ollective" not in str(error):
            return ""
        for _ in range(int(AWAY / PERIOD)):
            time.sleep(PERIOD)  # by then the others have published where they are
            away = self._away(self._state, failed=True)
            if away:
                return self._message(away)
        return ""

    def _message(self, away: str) -> str:
        if not away:
            return ""
        return (
            f"worker {self.rank} waits in call {self._state.number} of the model, {self._state.name}, for all workers, "
            f"but {away}. All workers have to make the same calls with as many batches: call fit, evaluate, predict "
            "and the result() of a metric on every worker, and let callbacks decide from the logs, which are the same "
            "on all, or use StopSignal"
        )

    def _away(self, state: _State, failed: bool = False) -> str:
        """Says where the first worker is that is away from the call of `state`; empty if none is.

        A worker that is in an earlier call, or has left it with an error, may still come, unless the operations of this
        call have `failed`.
        """
        places = (self._where(rank, state, failed) for rank in range(self.num_workers) if rank != self.rank)
        return next(filter(None, places), "")

    def _where(self, rank: int, state: _State, failed: bool) -> str:
        """Says where a worker is if it is not in the call of `state` or on its way there."""
        try:
            text = tf_context.context().get_config_key_value(f"{_KEY}{rank}", timeout_in_ms=100)
        except tf.errors.OpError:
            return ""
        number, _, rest = text.partition("\n")
        if not number.isdigit():
            return f"the process of worker {rank} has ended"
        name, operation, awaited, end = rest.split("\n", 3)
        if int(number) < state.number:
            if not failed or end == _RETURNED:
                return ""
            return f"worker {rank} {end or f'is still in call {number},'} {name}"
        if int(number) > state.number:
            return f"worker {rank} has left that call and is in call {number}, {name}"
        if end:
            return f"worker {rank} {end} {name}"
        if name != state.name:
            return f"worker {rank} is in its call {number} in {name}"
        if int(operation) != state.operation or awaited == state.awaited:
            return ""
        return f"worker {rank} waits for {awaited or 'a step, and not for ' + state.awaited}"


def _left_with(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    telling = next((line for line in lines if "Error: " in line), lines[0])
    return f"has left, with {type(error).__name__} ({telling.strip()}), the call of"
