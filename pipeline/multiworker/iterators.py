"""Iterators over batches that do not hold up the training when they are released."""

import threading
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


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


def prepare(iterator: Any, strategy: tf.distribute.Strategy, *, is_of_validations: bool) -> None:
    """Prepares Keras's `EpochIterator` of a call of the model.

    Args:
        iterator: The iterator.
        strategy: Divides its batches.
        is_of_validations: Whether it is the one that `fit` resets and uses again for each validation.
    """
    cardinality = iterator._distributed_dataset.cardinality  # a property if distributed, else a method
    cardinality = cardinality() if callable(cardinality) else cardinality
    if cardinality == tf.data.UNKNOWN_CARDINALITY and not iterator.steps_per_epoch:
        iterator._interrupted_warning = lambda: None  # the end of the data is how the number of batches is found
    if cardinality == tf.data.INFINITE_CARDINALITY and is_of_validations:
        _keep(iterator, strategy)


def _keep(iterator: Any, strategy: tf.distribute.Strategy) -> None:
    """Lets the validations of a `fit` on endless data share one iterator of TensorFlow; Keras makes one for each.

    Each validation takes the first batches of the data, as in Keras, because these are repeated. To make an iterator
    for each would slow down the steps of the epoch after it, in which the old one is released.
    """
    dataset = iterator.data_adapter.get_tf_dataset()
    if not isinstance(dataset, tf.data.Dataset):
        return  # the caller has divided it, and Keras makes an iterator for each validation
    at_once = iterator.steps_per_execution
    batches = -(-iterator.steps_per_epoch // at_once) * at_once
    iterator._distributed_dataset = strategy.experimental_distribute_dataset(dataset.take(batches).repeat())
    make_anew = iterator.reset

    def reset() -> None:
        if iterator._steps_seen % batches:  # a callback has ended the last validation early
            make_anew()

    iterator.reset = reset
