"""What workers tell each other outside of a step: numbers and messages, without TensorFlow tracing a function."""

import numpy as np
import tensorflow as tf

from .guard import rank_of


def sum_over_workers(strategy: tf.distribute.Strategy, numbers: np.ndarray) -> np.ndarray:
    """Sums arrays of float64, one from each worker; all workers call it."""
    own = strategy.experimental_distribute_values_from_function(lambda _: tf.constant(numbers, tf.float64))
    # Of the class, since `metric_results.py` replaces that of the strategy.
    reduce = tf.distribute.Strategy.reduce
    total: np.ndarray = reduce(strategy, tf.distribute.ReduceOp.SUM, own, axis=None).numpy()
    return total


def of_all_workers(strategy: tf.distribute.Strategy, number: int, sums_metric: bool = False) -> list[int]:
    """Returns the number that each worker passes, in the order of the workers.

    Args:
        strategy: The strategy of the workers.
        number: An integer.
        sums_metric: Whether this worker announces that it sums the state of a metric next.

    Raises:
        RuntimeError: on all workers, if only some of them announce that.
    """
    numbers = np.zeros((2, strategy.num_replicas_in_sync))
    numbers[:, rank_of(strategy)] = number, sums_metric
    found, summing = sum_over_workers(strategy, numbers)
    if 0 < sum(summing) < len(summing):
        raise RuntimeError(
            f"worker {np.argmax(summing)} sums a metric, for its result(), and worker "
            f"{np.argmin(summing)} does not. All workers have to make the same calls with as many batches: call fit, "
            "evaluate, predict and the result() of a metric on every worker, and let callbacks decide from the logs, "
            "which are the same on all, or use StopSignal"
        )
    return [int(value) for value in found]


def messages_of_all_workers(strategy: tf.distribute.Strategy, message: bytes) -> list[bytes]:
    """Returns the message that each worker passes, in the order of the workers."""
    lengths = of_all_workers(strategy, len(message))
    words = [-(-length // 4) for length in lengths]
    if not any(words):
        return [b""] * len(words)
    ends = np.cumsum(words)
    everything = np.zeros(ends[-1])
    rank = rank_of(strategy)
    # 32 bits are exact in float64, and so is their sum with the zeros of the other workers.
    everything[ends[rank] - words[rank] : ends[rank]] = np.frombuffer(message + bytes(-len(message) % 4), np.uint32)
    joined = sum_over_workers(strategy, everything).astype(np.uint32)
    return [part.tobytes()[:length] for part, length in zip(np.split(joined, ends[:-1]), lengths, strict=True)]
