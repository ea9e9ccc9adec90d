"""How fast a training step is and where its time goes: waiting for data, all-reduce, share of the matmul peak (MFU).

Keras fetches the batch inside of the compiled step, so callbacks see no more than its beginning and its end. What lies
between is noted by TensorFlow itself, as operations of the step.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

MOMENTS = ("data", "reduce", "reduced")
FLOPS_PER_MAC = 3 * 2  # multiply and add; forward pass, gradients of the activations, gradients of the weights


@functools.cache
def matmul_peak(dtype: str = "float32", seconds: float = 0.5) -> float:
    """FLOP/s of the quickest of many square matmuls, on the threads that TensorFlow has in this process.

    Takes about `seconds`, plus a tenth, once in a process, which trials of a search may share. Call it after a
    MultiWorkerMirroredStrategy is made, which has to come before all of TensorFlow's operations.
    """
    size = 8192 if tf.config.list_logical_devices("GPU") else 1024
    matrix = tf.cast(tf.random.stateless_uniform((size, size), seed=(0, 0)), dtype)

    @tf.function
    def product() -> tf.Tensor:
        return tf.matmul(matrix, matrix)[0, 0]

    product().numpy()  # traced, and the threads awake
    quickest, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product().numpy()  # a number that has been copied to the host is there, also from a GPU
        quickest = min(quickest, time.perf_counter() - start)
    return 2 * size**3 / quickest


class StepClock(keras.callbacks.Callback):
    """Measures the steps of each epoch but its first, which may be traced and finds the prefetched batches.

    The step has to `note` its moments: "data" when its batch is there, "reduce" and "reduced" around the all-reduce.
    Moments that it does not note are left out of `metrics`.

    Args:
        batch_size: rows of a step over all workers.
        macs_per_image: multiply-accumulates of a forward pass.
        matmul_peak: FLOP/s of this worker; the other workers are taken to be like it.
        num_workers: that take part in a step.
    """

    def __init__(self, batch_size: int, macs_per_image: int, matmul_peak: float, num_workers: int = 1) -> None:
        super().__init__()
        self.batch_size, self.macs_per_image = batch_size, macs_per_image
        self.matmul_peak, self.num_workers = matmul_peak, num_workers
        # Made outside of any strategy scope: plain variables of this process.
        self._noted = {name: tf.Variable(0.0, trainable=False, dtype="float64") for name in MOMENTS}
        self._clear()

    def note(self, moment: str, tensors: Any) -> Any:
        """Notes the time at which all `tensors` are there; called in a training step, outside of what XLA compiles.

        Returns:
            `tensors`, for what comes after the moment: with one inter-op thread TensorFlow may otherwise look at the
            clock last of all.
        """
        given = [tensor for tensor in tf.nest.flatten(tensors, expand_composites=True) if tensor is not None]
        with tf.control_dependencies(given):
            noted = self._noted[moment].assign(tf.timestamp(), read_value=False)
        with tf.control_dependencies([noted]):
            return tf.nest.map_structure(
                lambda tensor: None if tensor is None else tf.identity(tensor), tensors, expand_composites=True
            )

    def _clear(self) -> None:
        self.steps = 0
        self._seconds: dict[str, float] = {}
        self._start = self._end = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._clear()
        self._in_first_step = True

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._begin = time.time()  # the clock of tf.timestamp

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._end = time.perf_counter()
        if self._in_first_step:
            self._in_first_step, self._start = False, self._end
            return
        self.steps += 1
        data, reduce, reduced = (float(self._noted[name].numpy()) for name in MOMENTS)
        if data:
            self._add("data_wait", data - self._begin)
        if reduced:
            self._add("all_reduce", reduced - reduce)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @property
    def images_per_second(self) -> float:
        """Of all workers together, in the epoch so far; 0 in its first step."""
        return self.steps * self.batch_size / (self._end - self._start) if self.steps else 0.0

    def metrics(self) -> dict[str, float]:
        """Of the epoch so far; empty where it had one step only.

        `images_per_second`, `step_ms` (end of a step to the end of the next), `mfu` (share of the matmul peak of all
        workers), `num_workers`; where noted `data_wait_ms`, `data_wait_share`, `all_reduce_ms` (with the wait for
        slower workers) and `all_reduce_share`, shares of the step.
        """
        if not self.steps:
            return {}
        total = self._end - self._start
        flops = FLOPS_PER_MAC * self.macs_per_image * self.images_per_second
        metrics = {
            "images_per_second": self.images_per_second,
            "step_ms": 1e3 * total / self.steps,
            "mfu": flops / (self.matmul_peak * self.num_workers),
            "num_workers": self.num_workers,
        }
        for name, seconds in self._seconds.items():
            metrics |= {f"{name}_ms": 1e3 * seconds / self.steps, f"{name}_share": seconds / total}
        return metrics


class StepReporter(keras.callbacks.Callback):
    """Tells how an epoch gets on, at most once in `every` seconds.

    Args:
        clock: stands before this one among the callbacks.
        tell: is given `epoch` and `step` (from 1), `steps` (of an epoch), `images_per_second`, and the epoch's means of
            `loss` and `accuracy` so far; must not block.
        steps: steps of a whole epoch.
    """

    def __init__(
        self, clock: StepClock, tell: Callable[[dict[str, float]], None], steps: int, every: float = 1.0
    ) -> None:
        super().__init__()
        self.clock, self.tell, self.steps, self.every = clock, tell, steps, every
        self._next = 0.0
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if time.monotonic() < self._next or not self.clock.steps:
            return
        self._next = time.monotonic() + self.every
        values = {name: float(np.squeeze(value)) for name, value in (logs or {}).items()}
        # An epoch that goes on in the middle has fewer steps in this `fit`.
        step = batch + 1 + self.steps - self.params["steps"]
        self.tell(
            {
                "epoch": self._epoch + 1,
                "step": step,
                "steps": self.steps,
                "images_per_second": self.clock.images_per_second,
                **{name: values[name] for name in ("loss", "accuracy") if name in values},
            }
        )
