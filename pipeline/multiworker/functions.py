"""The functions that Keras calls with an iterator or with batches: training step, test step and prediction."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from .data import Share, rows_of, share, with_a_row
from .first_step import FirstStep
from .guard import Guard, rank_of
from .iterators import BackgroundReleased
from .keras_internals import collectives_that_are_repeated
from .metrics import Logs
from .one_replica import OneReplica
from .predictions import received, rows_that_count, sent

Step = Callable[[Any], tuple[dict[str, tf.Tensor], Any]]
"""Computes one replica's part of a step; returns its logs and its number of rows."""


class StepFunction:
    """Runs `steps_per_execution` steps on an iterator and returns the logs over all replicas.

    Args:
        model: Compiled model.
        replica: What Keras sees within a step.
        logs: Computes the logs over all replicas.
        step: Step of one replica.
        first_step: If given, checks the step when it is given data of another kind than before.
        guard: Watches while this worker waits for others.
    """

    def __init__(
        self,
        model: keras.Model,
        replica: OneReplica,
        logs: Logs,
        step: Step,
        first_step: FirstStep | None,
        guard: Guard,
    ) -> None:
        self.model, self.replica, self.logs, self.step = model, replica, logs, step
        self.first_step, self.guard = first_step, guard
        self.strategy = replica.strategy
        self._run_of_replicas = model._autoconvert_optionals(lambda data: self.strategy.run(step, args=(data,)))
        self._checked: Any = None  # specification of the data that the step was checked with
        self._first: Any = None  # its first batch
        self._of_iterator = self._compiled(self._several_steps)
        self._of_batch: dict[Any, Callable[..., Any]] = {}

    def __call__(self, iterator: Any) -> dict[str, tf.Tensor]:
        with self.guard.waiting():
            return self._call(iterator)

    def _call(self, iterator: Any) -> dict[str, tf.Tensor]:
        if isinstance(iterator, BackgroundReleased):
            iterator = iterator.inner
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            return self.logs.refusing(lambda: self._on_batch(next(iterator)))  # called by `train_on_batch`
        use_first = tf.constant(False)
        if self.first_step and self.first_step.is_needed and iterator.element_spec != self._checked:
            self._first, use_first = next(iterator), tf.constant(True)
            self.first_step.check(self.step, self._first)
            # A function of its own, so that all workers trace it. A worker that traced another number of times than the
            # others would wait for them under other keys.
            self._of_iterator = self._compiled(self._several_steps)
            self._checked = iterator.element_spec
        return self.logs.refusing(lambda: self._of_iterator(iterator, self._first, use_first))

    def _compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if self.model.run_eagerly:
            return function
        return tf.function(function, reduce_retracing=True, autograph=False, **options)

    def _run(self, data: Any) -> Any:
        with self.replica.view():
            return self._run_of_replicas(data)

    def _finished(self, outputs: Any) -> dict[str, tf.Tensor]:
        if self.replica.num_replicas == 1:
            return outputs[0]
        return self.strategy.run(self.logs.over_replicas, args=outputs)

    def _one_step(self, data: Any) -> dict[str, tf.Tensor]:
        return self._finished(self._run(data))

    def _several_steps(self, iterator: Any, first: Any, use_first: tf.Tensor) -> dict[str, tf.Tensor]:
        with collectives_that_are_repeated():
            return self._steps(iterator, first, use_first)

    def _steps(self, iterator: Any, first: Any, use_first: tf.Tensor) -> dict[str, tf.Tensor]:
        data = iterator.get_next() if first is None else tf.cond(use_first, lambda: first, iterator.get_next)
        outputs = self._run(data)
        if self.model.steps_per_execution > 1:
            _, _, outputs = tf.while_loop(
                lambda count, more, outputs: more & (count < self.model.steps_per_execution),
                lambda count, more, outputs: self._next_step(iterator, count, outputs),
                (1, True, outputs),
            )
        return self._finished(outputs)

    def _next_step(self, iterator: Any, count: tf.Tensor, outputs: Any) -> tuple[tf.Tensor, tf.Tensor, Any]:
        data = iterator.get_next_as_optional()
        more = data.has_value()
        return count + 1, more, tf.cond(more, lambda: self._run(data.get_value()), lambda: outputs)

    def _on_batch(self, batch: Any) -> dict[str, tf.Tensor]:
        if self.replica.num_replicas == 1:
            function = self._of_batch.setdefault(None, self._compiled(self._one_step))
            return function(batch)
        own = shares_of_batch(batch, self.strategy)
        tensors = [value for value in tf.nest.flatten(own, expand_composites=True) if value is not None]
        present = tuple(value is not None for value in tf.nest.flatten(own, expand_composites=True))
        # Any number of rows, so that all workers trace equally often.
        specs = [tf.TensorSpec([None, *value.shape[1:]] if value.shape.rank else [], value.dtype) for value in tensors]

        def one_step(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
            given = iter(tensors)
            flat = [next(given) if here else None for here in present]
            return self._one_step(tf.nest.pack_sequence_as(own, flat, expand_composites=True))

        key = (present, tuple((tuple(spec.shape), spec.dtype) for spec in specs))
        if key not in self._of_batch:
            if self.first_step and self.first_step.is_needed:
                self.first_step.check(self.step, own)
            self._of_batch[key] = self._compiled(one_step, input_signature=specs)
        return self._of_batch[key](*tensors)


def shares_of_batch(batch: Any, strategy: tf.distribute.Strategy) -> Share:
    """Returns this worker's rows of a global batch of arrays or tensors."""
    tensors = tf.nest.map_structure(lambda value: None if value is None else tf.convert_to_tensor(value), batch)
    return share(tensors, rank_of(strategy), strategy.num_replicas_in_sync)


def predict_function(model: keras.Model, replica: OneReplica, logs: Logs, guard: Guard) -> Callable[[Any], Any]:
    """Makes a function that returns the predictions for all rows of some global batches, in their order."""
    strategy = replica.strategy
    structure: Any = None  # of the outputs, with their types

    def predict_step(data: Any) -> list[tuple[tf.Tensor, ...]]:
        nonlocal structure
        if isinstance(data, Share):
            logs.add_batch(data.fingerprint)
            rows, data = data.rows, data.data
        else:
            rows = rows_of(data)
        data = with_a_row(data, rows_of(data))
        with replica.batch(rows, None):
            outputs = model.predict_step(data)
        kept = [rows_that_count(value, rows, rows_of(data)) for value in tf.nest.flatten(outputs)]
        structure = tf.nest.pack_sequence_as(outputs, [value.dtype for value, _ in kept])
        logs.compare_batches(tf.add_n([misfits for _, misfits in kept]))
        return [sent(value) for value, _ in kept]

    run = model._autoconvert_optionals(lambda data: strategy.run(predict_step, args=(data,)))

    def predicted(batch: Any) -> Any:
        parts = tf.nest.map_structure(lambda value: strategy.gather(value, axis=0), run(batch))
        dtypes = tf.nest.flatten(structure)
        outputs = [received(of_output, dtype) for of_output, dtype in zip(parts, dtypes, strict=True)]
        return tf.nest.pack_sequence_as(structure, outputs)

    def predict(batches: Any) -> Any:
        with replica.view():
            outputs = [predicted(batch) for batch in batches]
        return tf.nest.map_structure(lambda *values: tf.concat(values, 0), *outputs)

    if not model.run_eagerly:
        predict = tf.function(predict, reduce_retracing=True, autograph=False)

    def function(batches: Any) -> Any:
        with guard.waiting():
            return logs.refusing(lambda: predict(batches))

    return function
