"""The check before the first step: a few rows are computed as by one process and as by the workers, and compared."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .constant_randomness import constant_randomness
from .data import Share, rows_of
from .guard import rank_of
from .keras_internals import replaced
from .metrics import Logs
from .one_replica import OneReplica
from .vectors import packed, unpacked

ROWS = 8  # of the first batch, over all workers
# Largest difference, relative to the largest number that is compared with it. The parts add up in another order.
TOLERANCE = 1e-3

Step = Callable[[Any], tuple[dict[str, tf.Tensor], Any]]
Found = dict[str, np.ndarray]
"""Values of a step by what they are."""


class FirstStep:
    """Computes the first rows of a batch in two ways and refuses a model for which they differ.

    Each worker computes all the rows as if it were the only process. Then the workers compute uneven parts of them, the
    first one a single row, by the operations of every later step. Logs, the variables of metrics, the gradients that
    optimizers get and all variables that a step changes itself must be the same. No optimizer is applied, random
    numbers are constants, layers of mixed precision compute in the precision of their variables, since the gradients of
    a few rows in bfloat16 are mostly rounding, and all variables get their values back.
    """

    def __init__(self, model: keras.Model, replica: OneReplica, logs: Logs) -> None:
        self.model, self.replica, self.logs = model, replica, logs
        self._rank = rank_of(replica.strategy)

    def check(self, step: Step, batch: Any) -> None:
        """Checks a step.

        Args:
            step: Computes one replica's part of a step; called in replica context with a `Share`.
            batch: First batch of the data, `Share`s or the batches of this worker.

        Raises:
            ValueError: on all workers, if a value differs; the message contains its name and both values.
        """
        rows = _with_padding(self._rows(batch))
        total = int(rows_of(rows))
        parts = _parts(total, self.replica.num_replicas)
        start = sum(parts[: self._rank])
        own = slice(min(start, total - 1), max(start + parts[self._rank], min(start, total - 1) + 1))
        with self._undone():
            alone = self._found(step, rows, total, total, alone=True)
        with self._undone():
            together = self._found(step, _take(rows, own), parts[self._rank], total, alone=False)
        message = self._difference(alone, together, parts)
        if message:
            with self._undone():
                again = self._found(step, rows, total, total, alone=True)
            if self._difference(alone, again, parts):
                message = (
                    "a step gives other numbers when it is repeated with the same rows, so it cannot be compared with "
                    "that of one process: take random numbers from keras.random or tf.random, or turn the comparison "
                    "off with multiworker.enable(model, check=False)"
                )
        messages = [found for found in self._gathered(message) if found]
        if messages:
            raise ValueError(messages[0])

    def _rows(self, batch: Any) -> Any:
        """The first rows of all workers."""
        data = batch.data if isinstance(batch, Share) else batch
        rows = batch.rows if isinstance(batch, Share) else None
        first = [self._local(value) for value in tf.nest.flatten(data)]
        first = [None if isinstance(value, tf.experimental.Optional) else value for value in first]
        count = int(self._local(rows)) if rows is not None else int(rows_of(first))
        wanted = min(count, -(-ROWS // self.replica.num_replicas))
        taken = _take(tf.nest.pack_sequence_as(data, first), slice(0, wanted))
        parts = [None if value is None else value.numpy() for value in tf.nest.flatten(taken, expand_composites=True)]
        of_workers = self._gathered((wanted, parts))
        batches = [
            tf.nest.pack_sequence_as(
                taken, [None if v is None else tf.constant(v) for v in values], expand_composites=True
            )
            for number, values in of_workers
            if number
        ]
        return tf.nest.map_structure(_joined, *batches)

    def _local(self, value: Any) -> Any:
        return self.replica.strategy.experimental_local_results(value)[0]

    def _gathered(self, value: Any) -> list[Any]:
        """Returns what each worker passes, in the order of the workers."""
        code = pickle.dumps(value)
        words = np.frombuffer(code + bytes(-len(code) % 4), np.int32)
        sizes = self.replica.strategy.gather(tf.constant([len(words)]), axis=0).numpy()
        joined = self.replica.strategy.gather(tf.constant(words), axis=0).numpy()
        return [pickle.loads(part.tobytes()) for part in np.split(joined, np.cumsum(sizes)[:-1])]

    def _found(self, step: Step, data: Any, rows: int, total: int, alone: bool) -> Found:
        replica = self.replica
        share = Share(data, tf.constant(rows), tf.constant(total), tf.constant(0, tf.int64))
        with contextlib.ExitStack() as stack:
            created = stack.enter_context(constant_randomness())
            stack.enter_context(replaced(keras.optimizers.LossScaleOptimizer, "scale_loss", lambda self, loss: loss))
            stack.enter_context(_in_full_precision(self.model))
            stack.enter_context(_eager())
            stack.enter_context(replica.view())
            replica.alone, replica.recorded = alone, []
            try:
                logs = replica.strategy.run(self._logs_step, args=(step, share))
                gradients = [(name, self._local(value)) for name, value in replica.recorded]
                metrics = {id(variable) for metric in self.model.metrics for variable in metric.variables}
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
        variables = [variable for metric in self.model.metrics for variable in metric.variables]
        states = [tf.cast(variable.value, tf.float64) for variable in variables]
        if not states:
            return logs
        sums = unpacked(self.replica.sum(packed(states, tf.float64)), states)
        return logs | {f"{variable.path} (state)": value for variable, value in zip(variables, sums, strict=True)}

    def _variables(self) -> list[keras.Variable]:
        of_metrics = [variable for metric in self.model.metrics for variable in metric.variables]
        return list({id(variable): variable for variable in [*self.model.variables, *of_metrics]}.values())

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Gives all variables their values back that they have at the beginning; metrics start at zero in between."""
        known = self._variables()
        # The variables of this process, without an exchange with other workers.
        local = [self._local(variable.value) for variable in known] + [self.logs.read]
        values = [variable.numpy() for variable in local]
        for metric in self.model.metrics:
            for variable in metric.variables:
                own = self._local(variable.value)
                own.assign(tf.zeros_like(own))
        try:
            yield
        finally:
            for variable, value in zip(local, values, strict=True):
                variable.assign(value)

    def _difference(self, alone: Found, together: Found, parts: list[int]) -> str | None:
        """The message about the first value that differs."""
        gradients = [np.abs(value) for name, value in alone.items() if name.startswith("gradient") and value.size]
        largest = max([float(np.nanmax(np.where(np.isfinite(value), value, 0))) for value in gradients], default=0.0)
        for name in [*alone, *(name for name in together if name not in alone)]:
            if name not in alone or name not in together:
                return _message(name, "nothing" if name not in alone else "a value", "the opposite", parts)
            one, several = alone[name], together[name]
            least = max(0.1 * largest, 1e-4) if name.startswith("gradient") else 0.1
            if one.shape == several.shape:
                at = _where_different(one, several, TOLERANCE, least)
                if at is None:
                    continue
                return _message(name, f"{one.flat[at]:.6g}", f"{several.flat[at]:.6g}", parts)
            return _message(name, f"of shape {one.shape}", f"of shape {several.shape}", parts)
        return None


def _where_different(one: np.ndarray, several: np.ndarray, tolerance: float, least: float) -> int | None:
    """Index of the entry that differs most, or None."""
    if not one.size or not np.issubdtype(one.dtype, np.number):
        return None if np.array_equal(one, several) else 0
    first, second = one.astype(np.float64).ravel(), several.astype(np.float64).ravel()
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(first - second))
    difference[np.isnan(difference)] = np.inf
    finite = np.abs(first[np.isfinite(first)])
    scale = max(least, float(finite.max()) if finite.size else 0.0)
    worst = int(difference.argmax())
    return worst if difference[worst] > tolerance * scale else None


def _message(name: str, one: str, several: str, parts: list[int]) -> str:
    kind, _, of = name.partition(" ")
    return (
        f"the first step would differ from that of one process: {kind} {of} is {one} for the first {sum(parts)} rows "
        f"in one process, and {several} when the workers compute {', '.join(map(str, parts))} of the rows and are put "
        "together by their rows. A loss, metric or layer combines the rows of a batch in another way than by a mean "
        "over them, such as a sum, a maximum, a product of rows or a statistic of the batch: make it a mean over rows, "
        "or turn the comparison off with multiworker.enable(model, check=False) if the difference is intended"
    )


def _parts(total: int, workers: int) -> list[int]:
    """Rows of each worker, as uneven as can be: one for each, and all others for the last but none."""
    parts = [1 if rank < total else 0 for rank in range(workers)]
    parts[min(workers, total) - 1] += max(total - workers, 0)
    return parts


def _take(batch: Any, rows: slice) -> Any:
    def taken(value: Any) -> Any:
        if isinstance(value, tf.SparseTensor):
            rest = value.dense_shape[1:]
            size = tf.concat([[rows.stop - rows.start], rest], 0)
            return tf.sparse.slice(value, tf.concat([[rows.start], tf.zeros_like(rest)], 0), size)
        if value is None or not len(value.shape):
            return value
        return value[rows]

    return tf.nest.map_structure(taken, batch)


def _with_padding(batch: Any) -> Any:
    """Sets the second half of every other row of integers to 0, as where sequences of other lengths are padded.

    The first batch may happen to have no padding, but a loss that counts the valid entries has to be seen with some.
    """

    def padded(value: Any) -> Any:
        if not isinstance(value, tf.Tensor) or not value.dtype.is_integer or value.shape.rank < 2:
            return value
        rows, length = tf.range(tf.shape(value)[0]), tf.range(tf.shape(value)[1])
        valid = (rows[:, tf.newaxis] % 2 == 0) | (length[tf.newaxis] < (tf.shape(value)[1] + 1) // 2)
        return value * tf.cast(
            tf.reshape(valid, tf.concat([tf.shape(valid), tf.ones(value.shape.rank - 2, tf.int32)], 0)), value.dtype
        )

    return tf.nest.map_structure(padded, batch)


def _joined(*values: Any) -> Any:
    if isinstance(values[0], tf.SparseTensor):
        return tf.sparse.concat(0, values)
    if values[0] is None or not len(values[0].shape):
        return values[0]
    return tf.concat(values, 0)


def _number(value: Any) -> np.ndarray:
    value = tf.convert_to_tensor(value)
    return (tf.cast(value, tf.float32) if value.dtype == tf.bfloat16 else value).numpy()


@contextlib.contextmanager
def _in_full_precision(model: keras.Model) -> Iterator[None]:
    """Lets layers of mixed precision compute in the type of their variables."""
    mixed = [layer for layer in model._flatten_layers() if layer.compute_dtype != layer.variable_dtype]
    policies = [layer.dtype_policy for layer in mixed]
    for layer in mixed:
        layer.dtype_policy = layer.variable_dtype
    try:
        yield
    finally:
        for layer, policy in zip(mixed, policies, strict=True):
            layer.dtype_policy = policy


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Runs functions that are decorated with tf.function operation by operation, so that none is traced here."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
