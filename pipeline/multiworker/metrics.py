"""Metrics and logs of a step over all replicas."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from .keras_internals import CompileMetrics, replaced
from .one_replica import OneReplica
from .predictions import OTHER_ROWS
from .vectors import packed, unpacked

_FACTOR = 0x5851F42D4C957F2D  # multiplier of Knuth's MMIX generator: mixes the order of the batches into their hash
_DIFFERENT = "the batches of the workers differ"
DIFFERENT_BATCHES = (
    "the workers were given different batches, so that some rows would be trained on twice and others never. Every "
    "worker must pass the same global batches, in the same order and number: call keras.utils.set_random_seed with the "
    "same seed on every worker, give tf.data's shuffle a seed, and do not shard the data. Data of which every worker "
    "has only its own rows, such as ds.shard(...) or Ray's to_tf, is passed as multiworker.distribute(ds, strategy)"
)
_OTHER_ROWS = "an output has other rows than the batch"
_OTHER_RATES = "the learning rates of the workers differ"
_RATES = 1e-9  # relative to the square of their sum; what a callback computes may be rounded otherwise elsewhere
_MESSAGES = {
    _DIFFERENT: DIFFERENT_BATCHES,
    _OTHER_ROWS: OTHER_ROWS,
    _OTHER_RATES: (
        "the workers have different learning rates, so that their weights would part: give a callback that sets the "
        "learning rate, such as LearningRateScheduler or ReduceLROnPlateau, to every worker and not to one alone"
    ),
}
# Operations that call a function of TensorFlow, into which a graph gives no sight.
_CALLS = ("PartitionedCall", "StatefulPartitionedCall", "If", "StatelessIf", "While", "StatelessWhile", "Case")


class Logs:
    """Turns the logs of one replica's steps into those of the global batches.

    A value that is the result of a metric is computed from the sums of the metric's variables over the replicas. Any
    other value is the mean of the replicas' values, weighted by their rows. The vector that is summed also contains a
    hash of the batches that each worker has read, and its learning rates, so that workers that part are found in the
    step in which they do.
    """

    def __init__(self, model: keras.Model, replica: OneReplica) -> None:
        self.model, self.replica = model, replica
        self.read = tf.Variable(0, dtype=tf.int64, trainable=False)  # hash of all global batches until now
        self._metric_of: dict[str, tuple[keras.Metric, str | None]] = {}

    def add_batch(self, fingerprint: tf.Tensor) -> None:
        """Adds a global batch to the hash of those that this worker has read."""
        self.read.assign(self.read * _FACTOR + fingerprint)

    @contextlib.contextmanager
    def of_step(self, rows: int | tf.Tensor) -> Iterator[dict[str, Any]]:
        """Yields a dict for the logs of a step, notes their metrics, and undoes what a batch without rows changed."""
        variables = [variable for metric in self.model.metrics for variable in metric.variables]
        before = [] if isinstance(rows, int) else [tf.identity(variable.value) for variable in variables]
        results: list[tuple[Any, keras.Metric, str | None]] = []
        logs: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for metric in self._single_metrics():
                stack.enter_context(replaced(metric, "result", _noting(metric, metric.result, results)))
            yield logs
        self._metric_of = {
            name: (metric, part) for name, value in logs.items() for result, metric, part in results if result is value
        }
        for name, value in logs.items():
            if name not in self._metric_of and _follows_from(value, [result for result, *_ in results]):
                self.replica.refusals.append(
                    f"the log {name!r} is computed from the result of a metric, which a worker has for its own rows of "
                    "all batches until now, so that the mean over the workers would be another number: return the "
                    "result itself, from a step without a tf.function of its own, let the `result` of a metric of your "
                    "own compute the number, or compute it in a callback"
                )
        for variable, value in zip(variables, before, strict=False):  # empty if there are rows
            variable.assign(tf.where(rows > 0, variable.value, value))

    def over_replicas(self, logs: dict[str, tf.Tensor], rows: int | tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the logs over all replicas; called in replica context.

        Args:
            logs: Logs of this replica's last step, made under `of_step`.
            rows: Number of rows that this replica had in that step.
        """
        metrics = list({id(metric): metric for metric, _ in self._metric_of.values()}.values())
        variables = [variable for metric in metrics for variable in metric.variables]
        weight = tf.cast(rows, tf.float64)
        others = {name: value for name, value in logs.items() if name not in self._metric_of}
        weighted = [tf.math.multiply_no_nan(tf.cast(value, tf.float64), weight) for value in others.values()]
        # Sums of numbers below 2**32 are exact in float64.
        pieces = tf.cast(tf.bitcast(self.read, tf.uint16), tf.float64)
        rates = packed([tf.zeros([0]), *(rate.value for rate in learning_rates(self.model))], tf.float64)
        compared = [rates, tf.square(rates), pieces, tf.square(pieces)]
        parts = [*(variable.value for variable in variables), *weighted, weight, *compared]
        sums = unpacked(self.replica.sum(packed(parts, tf.float64)), parts)
        self._compare_rates(*sums[-4:-2])
        self._compare(*sums[-2:])
        values, total = iter(sums[: len(variables)]), sums[-5]
        result_of = {
            id(metric): metric.stateless_result([next(values) for _ in metric.variables]) for metric in metrics
        }
        means = dict(zip(others, (value / total for value in sums[len(variables) : -5]), strict=True))
        found = {}
        for name, value in logs.items():
            if name in means:
                found[name] = tf.cast(means[name], value.dtype)
            else:
                metric, part = self._metric_of[name]
                found[name] = result_of[id(metric)] if part is None else result_of[id(metric)][part]
        return found

    def compare_batches(self, misfits: tf.Tensor) -> None:
        """Compares the batches that the workers have read until now; called in replica context.

        Args:
            misfits: Number of outputs of this worker whose rows are not those of the batch; any is refused by all.
        """
        pieces = tf.cast(tf.bitcast(self.read, tf.uint16), tf.float64)
        total, squares, of_all = tf.split(
            self.replica.sum(tf.concat([pieces, tf.square(pieces), [misfits]], 0)), [4, 4, 1]
        )
        self._compare(total, squares)
        tf.debugging.Assert(of_all[0] == 0, [_OTHER_ROWS])

    def _compare(self, total: tf.Tensor, squares: tf.Tensor) -> None:
        """Asserts that all replicas have the same numbers, given the sums of the numbers and of their squares."""
        if self.replica.alone:
            return
        number = tf.constant(self.replica.num_replicas, tf.float64)
        tf.debugging.Assert(tf.reduce_all(number * squares == tf.square(total)), [_DIFFERENT])

    def _compare_rates(self, total: tf.Tensor, squares: tf.Tensor) -> None:
        """Asserts that all replicas have about the same numbers; one that is NaN on all is left to the loss."""
        if self.replica.alone:
            return
        spread = tf.constant(self.replica.num_replicas, tf.float64) * squares - tf.square(total)
        tf.debugging.Assert(~tf.reduce_any(spread > _RATES * tf.square(total)), [_OTHER_RATES])

    def refusing(self, call: Callable[[], Any]) -> Any:
        """Returns the result of `call`.

        Raises:
            ValueError: if it found that the batches or the learning rates of the workers differ, or that an output has
                other rows.
        """
        try:
            return call()
        except tf.errors.InvalidArgumentError as error:
            message = next((message for sign, message in _MESSAGES.items() if sign in str(error)), None)
            if message is None:
                raise
            raise ValueError(message) from None

    def _single_metrics(self) -> Iterator[keras.Metric]:
        for metric in self.model.metrics:
            if isinstance(metric, CompileMetrics):
                yield from metric.metrics
            else:
                yield metric


def learning_rates(model: keras.Model) -> list[keras.Variable]:
    """The learning rates that callbacks can set: those of the optimizers of a model that follow no schedule."""
    owners = [model, *(layer for layer in model._flatten_layers() if isinstance(layer, keras.Model))]
    optimizers = [optimizer for owner in owners for optimizer in _optimizers_in(vars(owner))]
    variables = [variable for optimizer in optimizers for variable in optimizer.variables]
    return list({id(v): v for v in variables if v.name == "learning_rate"}.values())


def _optimizers_in(value: Any) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizers that are an attribute, or in a list or dict that is one."""
    if isinstance(value, keras.optimizers.Optimizer):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _optimizers_in(each)


def flat(logs: dict[str, Any]) -> dict[str, Any]:
    """Flattens logs: a metric that is a dict of values is replaced by its entries."""
    return {
        inner: item
        for name, value in logs.items()
        for inner, item in (value if isinstance(value, dict) else {name: value}).items()
    }


def _follows_from(value: Any, results: list[Any]) -> bool:
    """Whether a log of a step that is being traced is computed from results of metrics; False if it is not traced."""
    graph = getattr(value, "graph", None)
    if graph is None:
        return False
    traced = [result for result in results if isinstance(result, tf.Tensor) and hasattr(result, "graph")]
    names = {result.name for result in traced if result.graph is graph}
    within_calls = len(names) < len({(id(result.graph), result.name) for result in traced})
    waiting, seen = [value], set()
    while waiting:
        tensor = waiting.pop()
        if tensor.name in names or (within_calls and tensor.op.type in _CALLS):
            return True
        if tensor.op.name not in seen:
            seen.add(tensor.op.name)
            waiting.extend(tensor.op.inputs)
    return False


def _noting(metric: keras.Metric, result: Callable[[], Any], results: list[Any]) -> Callable[[], Any]:
    def noted() -> Any:
        value = result()
        if isinstance(value, dict):
            results.extend((item, metric, name) for name, item in value.items())
        else:
            results.append((value, metric, None))
        return value

    return noted
