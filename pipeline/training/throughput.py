"""Throughput of training steps: images/s, wait for data, all-reduce, and share of the matmul peak (MFU).

Keras fetches the batch inside the compiled step, so that callbacks see only the beginning and the end of a step. The
times in between are recorded by TensorFlow operations that are part of the step.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.training.worker import StepProgress

MOMENTS = ("data", "reduce", "reduced")
FLOPS_PER_MAC = 3 * 2  # multiply and add; forward pass, gradients of the activations, gradients of the weights


@functools.cache
def matmul_peak(dtype: str = "float32", seconds: float = 0.5, products: int = 1) -> float:
    """FLOP/s of the fastest of many square matmuls, with the threads that TensorFlow has in this process.

    `products` are computed at a time, side by side where threads compute whole operations. Takes about `seconds` plus a
    tenth, once per process; the trials of a search may share a process. Call it only after a
    MultiWorkerMirroredStrategy is created, which must precede all TensorFlow operations.
    """
    size = 8192 if tf.config.list_logical_devices("GPU") else 1024
    # Each product has a matrix of its own: TensorFlow would compute equal products once.
    matrices = [
        tf.cast(tf.random.stateless_uniform((size, size), seed=(0, number)), dtype) for number in range(products)
    ]

    @tf.function
    def product() -> tf.Tensor:
        return tf.stack([tf.matmul(matrix, matrix)[0, 0] for matrix in matrices])

    product().numpy()  # traces the function and wakes the threads
    fastest, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product().numpy()  # the copy to the host waits for the product, on a GPU too
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 * products / fastest


class StepClock(keras.callbacks.Callback):
    """Measures the steps of each epoch except the first, which may be traced and finds batches already prefetched.

    The step calls `note` at its moments: "data" when its batch has arrived, "reduce" and "reduced" before and after the
    all-reduce. `metrics` leaves out the moments that are not noted.

    Args:
        batch_size: Rows of a step over all workers.
        macs_per_image: Multiply-accumulates of a forward pass; None: not known, there is no `mfu` then.
        matmul_peak: FLOP/s of this worker; the other workers are assumed to be equal.
        num_workers: Number of workers that take part in a step.
    """

    def __init__(self, batch_size: int, macs_per_image: int | None, matmul_peak: float, num_workers: int = 1) -> None:
        super().__init__()
        self.batch_size, self.macs_per_image = batch_size, macs_per_image
        self.matmul_peak, self.num_workers = matmul_peak, num_workers
        # Created outside any strategy scope, so that they are plain variables of this process.
        self._noted = {name: tf.Variable(0.0, trainable=False, dtype="float64") for name in MOMENTS}
        self._clear()

    def note(self, moment: str, tensors: Any) -> Any:
        """Records the time at which all `tensors` are computed; called in a training step, outside what XLA compiles.

        Returns:
            `tensors`, to be used after the moment: with one inter-op thread, TensorFlow may otherwise read the clock at
            the very end of the step.
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
        """Throughput of all workers together in the epoch so far; 0 in its first step."""
        return self.steps * self.batch_size / (self._end - self._start) if self.steps else 0.0

    def metrics(self) -> dict[str, float]:
        """Metrics of the epoch so far; empty if it has had one step only.

        Returns:
            `images_per_second`, `step_ms` (from the end of a step to the end of the next) and `num_workers`; if the
            multiply-accumulates are known, `mfu` (share of the matmul peak of all workers); if noted, also
            `data_wait_ms`, `all_reduce_ms` (which includes the wait for slower workers), and their shares of the step,
            `data_wait_share` and `all_reduce_share`.
        """
        if not self.steps:
            return {}
        total = self._end - self._start
        metrics = {
            "images_per_second": self.images_per_second,
            "step_ms": 1e3 * total / self.steps,
            "num_workers": self.num_workers,
        }
        if self.macs_per_image is not None:
            flops = FLOPS_PER_MAC * self.macs_per_image * self.images_per_second
            metrics["mfu"] = flops / (self.matmul_peak * self.num_workers)
        for name, seconds in self._seconds.items():
            metrics |= {f"{name}_ms": 1e3 * seconds / self.steps, f"{name}_share": seconds / total}
        return metrics


class StepReporter(keras.callbacks.Callback):
    """Reports the progress within an epoch.

    Args:
        clock: Must come before this callback in the list of callbacks.
        report: Called with the progress; must not block.
        steps: Steps of a whole epoch.
        every: Least time between two reports, in seconds.
    """

    def __init__(
        self, clock: StepClock, report: Callable[[StepProgress], None], steps: int, every: float = 1.0
    ) -> None:
        super().__init__()
        self.clock, self.report, self.steps, self.every = clock, report, steps, every
        self._next = 0.0
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if time.monotonic() < self._next or not self.clock.steps:
            return
        self._next = time.monotonic() + self.every
        values = {name: float(np.squeeze(value)) for name, value in (logs or {}).items()}
        # An epoch that is continued from a checkpoint has fewer steps in this call of `fit`.
        step = batch + 1 + self.steps - self.params["steps"]
        self.report(
            StepProgress(
                epoch=self._epoch + 1,
                step=step,
                steps=self.steps,
                images_per_second=self.clock.images_per_second,
                loss=values["loss"],
                accuracy=values["accuracy"],
            )
        )
