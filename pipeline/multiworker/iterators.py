"""Iterators over batches that are released in the background."""

import threading
from collections.abc import Iterable
from typing import Any


class BackgroundReleased:
    """An iterator whose resources are released in a thread of their own.

    The destructor of an iterator of tf.data waits for the thread of the autotuner, which is sometimes not woken and
    sleeps longer the longer it has run, up to a minute. All other workers would wait for this one between two epochs,
    and this one would return from `fit` long after them. Only the end of the process waits for such a thread.

    Args:
        batches: Distributed dataset to iterate over.

    Attributes:
        inner: Iterator of TensorFlow.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.inner = iter(batches)

    def __iter__(self) -> "BackgroundReleased":
        return self

    def __next__(self) -> Any:
        return next(self.inner)

    def __del__(self) -> None:
        held = [vars(self).pop("inner", None)]  # the only reference to it
        # No daemon: a thread that comes back from TensorFlow while the interpreter ends would abort the process.
        if threading.main_thread().is_alive():
            threading.Thread(target=held.clear, name="multiworker-release", daemon=False).start()
