"""The check before the first step: a few rows are computed as by one process and as by the workers, and compared."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .clipping import clipping_always
from .comparison import Found, difference, largest_changes
from .constant_randomness import constant_randomness
from .data import Share, rows_of
from .exchange import messages_of_all_workers, of_all_workers
from .few_rows import first_rows, take, uneven_parts, with_padding
from .guard import Guard, rank_of
from .keras_internals import plain_variables, replaced
from .metrics import Logs
from .one_replica import OneReplica
from .precision import computing_in_float64, computing_in_the_type_of_variables, in_float64, rounded_otherwise
from .same_weights import refuse_other_weights
from .vectors import packed, unpacked

TRIALS = 2  # of how much rounding changes a step

Step = Callable[[Any], tuple[dict[str, tf.Tensor], Any]]


@dataclass(frozen=True)
class _Rows:
    """The step that is checked, and its rows.

    Attributes:
        step: Computes one replica's part of a step.
        data: All the rows.
        parts: Number of rows of each worker.
        own: The rows of this worker, at least one.
        number: How many of them count.
    """

    step: Step
    data: Any
    parts: list[int]
    own: slice
    number: int

    @property
    def total(self) -> int:
        return sum(self.parts)


class FirstStep:
    """Computes the first rows of a batch in two ways and refuses a model for which they differ.

    Each worker computes all the rows as if it were the only process. Then the workers compute uneven parts of them, the
    first one a single row, by the operations of every later step. Logs, the variables of metrics, the gradients that
    optimizers get and all variables that a step changes itself must be the same. No optimizer is applied, random
    numbers are constants, gradients that the step clips itself are always clipped, layers of mixed precision compute in
    the precision of their variables, since the gradients of a few rows in bfloat16 are mostly rounding, and all
    variables get their values back.

    A deep model may amplify rounding until nothing of a gradient is left. Where something differs, the rows are
    therefore computed again in float64. If the step cannot be, because it has a dtype of its own, it is repeated with
    weights that are rounded otherwise, and what that changes is allowed.
    """

    def __init__(self, model: keras.Model, replica: OneReplica, logs: Logs, compares: bool) -> None:
        self.model, self.replica, self.logs, self.compares = model, replica, logs, compares
        self._rank = rank_of(replica.strategy)
        self._starts: dict[int, tf.Tensor] = {}

    @property
    def is_needed(self) -> bool:
        return self.compares or not is_built(self.model)

    def compare_weights(self, guard: Guard) -> None:
        """Compares the weights at the beginning of a call; since the last one a worker may have set them by itself.

        Raises:
            ValueError: on all workers, if a variable differs.
        """
        if self.compares:
            with guard.waiting():
                refuse_other_weights(self.model, self.replica.strategy)

    def check(self, step: Step, batch: Any) -> None:
        """Checks a step, which also makes the weights that the model does not have yet.

        Args:
            step: Computes one replica's part of a step; called in replica context with a `Share`.
            batch: First batch of the data, `Share`s or the batches of this worker.

        Raises:
            ValueError: on all workers, if a value differs; the message contains its name and both values. Or if the
                workers have different weights.
        """
        if self.compares:
            refuse_other_weights(self.model, self.replica.strategy)
        data = first_rows(batch, self.replica.strategy)
        total = int(rows_of(data))
        parts = uneven_parts(total, self.replica.num_replicas)
        start = sum(parts[: self._rank])
        first = min(start, total - 1)
        own = slice(first, max(start + parts[self._rank], first + 1))
        rows = _Rows(step, with_padding(data), parts, own, parts[self._rank])
        self._starts = self._starts_of_metrics()
        try:
            alone = self._alone(rows)
        except Exception:  # on all workers, because all compute the same
            # Zero may be no number that the model takes: a class, or an id of IntegerLookup, that it does not know.
            rows = replace(rows, data=data)
            alone = self._alone(rows)
        if not self.compares:
            return
        together = self._together(rows)
        message = difference(alone, together, parts)
        # What follows is done by all workers or by none.
        if not any(of_all_workers(self.replica.strategy, int(bool(message)))):
            return
        message = self._beyond_rounding(rows, alone, together)
        if message and difference(alone, self._alone(rows), parts):
            message = (
                "a step gives other numbers when it is repeated with the same rows, so it cannot be compared with "
                "that of one process: take random numbers from keras.random or tf.random, or turn the comparison "
                "off with multiworker.enable(model, check=False)"
            )
        messages = [
            found.decode() for found in messages_of_all_workers(self.replica.strategy, message.encode()) if found
        ]
        if messages:
            raise ValueError(messages[0])

    def _beyond_rounding(self, rows: _Rows, alone: Found, together: Found) -> str:
        """The message about the first value that differs by more than by rounding."""
        try:
            exactly = self._alone(rows, float64=True)
        except Exception:  # on all workers, because all compute the same
            rounding: dict[str, float] = {}
            for trial in range(TRIALS):
                for name, change in largest_changes(alone, self._alone(rows, trial=trial)).items():
                    rounding[name] = max(change, rounding.get(name, 0.0))
            return difference(alone, together, rows.parts, rounding)
        return difference(exactly, self._together(rows, float64=True), rows.parts)

    def _alone(self, rows: _Rows, float64: bool = False, trial: int | None = None) -> Found:
        """What one process finds; as one of the `trial`s, if its weights and data are rounded otherwise."""
        data = rows.data
        with self._undone():
            for variable in self._of_metrics():
                if id(variable) in self._starts:
                    self._local(variable.value).assign(self._starts[id(variable)])
            if trial is not None:
                data = tf.nest.map_structure(lambda value: _moved(value, trial), data)
                for variable in self.model.trainable_variables:
                    own = self._local(variable.value)
                    own.assign(_moved(tf.convert_to_tensor(own), trial))
            return self._found(rows.step, data, rows.total, rows.total, alone=True, float64=float64)

    def _together(self, rows: _Rows, float64: bool = False) -> Found:
        """What the workers find."""
        with self._undone():
            return self._found(
                rows.step, take(rows.data, rows.own), rows.number, rows.total, alone=False, float64=float64
            )

    def _starts_of_metrics(self) -> dict[int, tf.Tensor]:
        """What one process has in the metrics' variables after `reset_state`, by the variables' ids.

        TensorFlow gives each worker its part of the value that is assigned. All workers call this, as it adds them up.
        """
        with self._undone():
            return {id(variable): tf.convert_to_tensor(variable.value) for variable in self._of_metrics()}

    def _local(self, value: Any) -> Any:
        return self.replica.strategy.experimental_local_results(value)[0]

    def _found(self, step: Step, data: Any, rows: int, total: int, alone: bool, float64: bool) -> Found:
        replica = self.replica
        share = Share(
            in_float64(data) if float64 else data, tf.constant(rows), tf.constant(total), tf.constant(0, tf.int64)
        )
        with contextlib.ExitStack() as stack:
            created = stack.enter_context(constant_randomness())
            stack.enter_context(clipping_always())
            stack.enter_context(replaced(keras.optimizers.LossScaleOptimizer, "scale_loss", lambda self, loss: loss))
            stack.enter_context((computing_in_float64 if float64 else computing_in_the_type_of_variables)(self.model))
            stack.enter_context(_eager())
            stack.enter_context(replica.view())
            replica.alone, replica.recorded = alone, []
            try:
                logs = replica.strategy.run(self._logs_step, args=(step, share))
                gradients = [(name, self._local(value)) for name, value in replica.recorded]
                metrics = {id(variable) for variable in self._of_metrics()}
                changed = {
                    f"variable {variable.path}": _number(self._local(variable.value))
                    for variable in self._variables()
                    if id(variable) not in metrics
                }
                for variable, value in created:  # of layers that are built by their first call, which this is
                    self._local(variable.value).assign(value)
            finally:
                replica.alone, replica.recorded = False, None
        return (
            {f"log {name}": _number(self._local(value)) for name, value in logs.items()}
            | {f"gradient {index} of {name}": _number(value) for index, (name, value) in enumerate(gradients)}
            | changed
        )

    def _logs_step(self, step: Step, share: Share) -> dict[str, tf.Tensor]:
        logs = self.logs.over_replicas(*step(share))
        variables = self._of_metrics()
        states = [tf.cast(variable.value, tf.float64) for variable in variables]
        if not states:
            return logs
        sums = unpacked(self.replica.sum(packed(states, tf.float64)), states)
        return logs | {f"{variable.path} (state)": value for variable, value in zip(variables, sums, strict=True)}

    def _of_metrics(self) -> list[keras.Variable]:
        return [variable for metric in self.model.metrics for variable in metric.variables]

    def _variables(self) -> list[keras.Variable]:
        return list({id(variable): variable for variable in [*self.model.variables, *self._of_metrics()]}.values())

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Gives all variables their values back that they have at the beginning; metrics are reset in between."""
        known = self._variables()
        # The variables of this process, without an exchange with other workers.
        local = [self._local(variable.value) for variable in known] + [self.logs.read]
        local += [self._local(variable) for variable in plain_variables(self.model)]
        values = [tf.convert_to_tensor(variable) for variable in local]
        for metric in self.model.metrics:
            metric.reset_state()
        try:
            yield
        finally:
            for variable, value in zip(local, values, strict=True):
                variable.assign(value)
            before = {id(variable) for variable in known}
            for metric in self.model.metrics:
                # Those of `compile` may be found only in the first step.
                if any(id(variable) not in before for variable in metric.variables):
                    metric.reset_state()


def is_built(model: keras.Model) -> bool:
    """Whether all layers have their weights."""
    return all(layer.built for layer in model._flatten_layers())


def _moved(value: Any, trial: int) -> Any:
    return rounded_otherwise(value, trial) if isinstance(value, tf.Tensor) and value.dtype.is_floating else value


def _number(value: Any) -> np.ndarray:
    value = tf.convert_to_tensor(value)
    return (tf.cast(value, tf.float32) if value.dtype == tf.bfloat16 else value).numpy()


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Runs functions that are decorated with tf.function operation by operation, so that none is traced here.

    TensorFlow would warn that this is slow, which it is for many steps.
    """
    before, logger = tf.config.functions_run_eagerly(), tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
        logger.setLevel(level)
