"""Workers that part"""

import os
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from case_registry import CROSSENTROPY, FIT, Result, Worker, X, Y, case, classifier, fitted

LONG: dict[str, Any] = FIT | {"epochs": 1000}
DEAD = r"/task:[01].*stopped sending heartbeats"  # TensorFlow's own message, where a process has ended before


def mlp(worker: Worker) -> keras.Model:
    return worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"])


class AfterTheFirstEpoch(keras.callbacks.Callback):
    """Does something at the end of the first epoch, on rank 1 alone."""

    def __init__(self, worker: Worker, action: Callable[[keras.Model], Any]) -> None:
        super().__init__()
        self.worker, self.action = worker, action

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0 and self.worker.rank == 1:
            self.worker.part()
            self.action(self.model)


@case((f"worker 1 has ended|{DEAD}", ""), parts=True)
def evaluate_on_the_chief_alone(worker: Worker) -> Result:
    """`evaluate` on rank 0 alone, while the script of the other has ended"""
    model = mlp(worker)
    model.fit(X, Y, **FIT)
    worker.part()
    if worker.rank == 0:
        model.evaluate(X, Y, verbose=0)
    return {}


@case((f"worker 1 .*predict|{DEAD}", f"worker 0 .*evaluate|{DEAD}"), parts=True)
def other_calls(worker: Worker) -> Result:
    """`evaluate` on one rank and `predict` on the other"""
    model = mlp(worker)
    model.fit(X, Y, **FIT)
    worker.part()
    if worker.rank == 0:
        model.evaluate(X, Y, verbose=0)
    else:
        model.predict(X, verbose=0)
    return {}


@case(("worker 1", "worker 0"), parts=True)
def one_worker_stops(worker: Worker) -> Result:
    """a callback that sets `stop_training` on one rank, which then goes on to `evaluate`"""

    def stop(model: keras.Model) -> None:
        model.stop_training = True

    model = mlp(worker)
    model.fit(X, Y, callbacks=[AfterTheFirstEpoch(worker, stop)], **LONG)
    model.evaluate(X, Y, verbose=0)
    return {}


@case(("worker 1.*no more disk", "no more disk"), parts=True, slow=False)
def one_worker_raises(worker: Worker) -> Result:
    """a callback that raises on one rank"""

    def fail(model: keras.Model) -> None:
        raise OSError("no more disk")

    mlp(worker).fit(X, Y, callbacks=[AfterTheFirstEpoch(worker, fail)], **LONG)
    return {}


@case((f"worker 1|{DEAD}", ""), parts=True)
def one_worker_ends(worker: Worker) -> Result:
    """one process ends in the middle of `fit`"""
    mlp(worker).fit(X, Y, callbacks=[AfterTheFirstEpoch(worker, lambda _: os._exit(3))], **LONG)
    return {}


@case(("worker 1", "no such row"), parts=True)
def data_of_one_worker_raise(worker: Worker) -> Result:
    """data that raise on one rank"""

    class Broken(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            if index == 3 and worker.rank == 1:
                worker.part()
                raise IndexError("no such row")
            return X[:16], Y[:16]

    mlp(worker).fit(Broken(), epochs=20, verbose=0, shuffle=False)
    return {}


@case()
def one_worker_is_late(worker: Worker) -> Result:
    """a rank that pauses for 20 s between two epochs: it is waited for"""
    return fitted(mlp(worker), X, Y, callbacks=[AfterTheFirstEpoch(worker, lambda _: time.sleep(20))])


ONE_ASKS = r"result\(\) of a metric"


@case(
    (
        f"worker 1 (waits for the sum of a metric|has left).*{ONE_ASKS}",
        f"worker 0 (waits for a step|has left).*{ONE_ASKS}",
    ),
    parts=True,
)
def result_of_a_metric_on_one_rank(worker: Worker) -> Result:
    """a callback that asks for the results of metrics on one rank alone"""

    def ask(model: keras.Model) -> None:
        print(model.get_metrics_result())

    mlp(worker).fit(X, Y, callbacks=[AfterTheFirstEpoch(worker, ask)], **LONG)
    return {}


@case((f"worker 1|{DEAD}", ""), parts=True)
def result_of_a_metric_after_the_call(worker: Worker) -> Result:
    """a result of a metric that one rank asks for when `fit` has ended, and the process of the other as well"""
    model = mlp(worker)
    model.fit(X, Y, **FIT)
    worker.part()
    if worker.rank == 0:
        model.metrics[0].result()
    return {}


@case()
def result_of_a_metric_on_all_ranks(worker: Worker) -> Result:
    """a callback that asks for the results of metrics on all ranks, of which one is late"""
    found: Result = {}

    class Ask(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0 and worker.rank == 1:
                time.sleep(10)
            found.update({f"{name} {epoch}": float(value) for name, value in self.model.get_metrics_result().items()})

    model = mlp(worker)
    return fitted(model, X, Y, callbacks=[Ask()]) | found
