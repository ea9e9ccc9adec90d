"""Metrics outside of a step: TensorFlow sums their state over the workers, so that all of them have to ask for it."""

from typing import Any

import keras
import tensorflow as tf

from .exchange import of_all_workers
from .guard import SUM_OF_METRIC, Guard
from .keras_internals import replaced


def watch_results(model: keras.Model, guard: Guard) -> None:
    """Lets a worker that alone asks for the result of a metric end with an error.

    Without this its sum would be put together with whatever the others sum next, or it would wait for ever.
    """
    strategy = model.distribute_strategy
    reset_metrics = type(model).reset_metrics.__get__(model)

    def reset() -> None:
        # TensorFlow also sums a metric that is set, and Keras takes no notice of the sum.
        with replaced(strategy, "reduce", lambda op, value, axis=None: strategy.experimental_local_results(value)[0]):
            reset_metrics()

    model.reset_metrics = reset
    if "reduce" in vars(strategy):  # by another model
        return
    reduce = strategy.reduce

    def watched(reduce_op: Any, value: Any, axis: Any = None) -> Any:
        if not isinstance(value, tf.Variable) or not tf.executing_eagerly():
            return reduce(reduce_op, value, axis)
        with guard.call(SUM_OF_METRIC), guard.waiting(SUM_OF_METRIC):
            of_all_workers(strategy, 0, sums_metric=True)
            return reduce(reduce_op, value, axis)

    strategy.reduce = watched
