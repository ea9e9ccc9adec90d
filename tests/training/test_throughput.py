"""`StepClock` and `StepReporter` in a training whose steps take known times."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.training.throughput import FLOPS_PER_MAC, StepClock, StepReporter, matmul_peak
from pipeline.training.worker import StepProgress

BATCH, STEPS, PAUSE = 8, 6, 0.05


def batches(seconds: float) -> tf.data.Dataset:
    """Endless batches that arrive `seconds` apart."""

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            time.sleep(seconds)
            yield np.ones((BATCH, 3), np.float32), np.zeros(BATCH, np.float32)

    return tf.data.Dataset.from_generator(
        generate, output_signature=(tf.TensorSpec((BATCH, 3)), tf.TensorSpec((BATCH,)))
    )


def train(seconds: float, reduction: float, *callbacks: keras.callbacks.Callback, clock: StepClock) -> None:
    """Trains an epoch whose batches take `seconds` and whose stand-in for the all-reduce takes `reduction` seconds."""
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["accuracy"], jit_compile=False)
    step = model.train_step

    def slow(value: tf.Tensor) -> tf.Tensor:
        time.sleep(reduction)
        return value

    def timed(data: Any) -> dict[str, tf.Tensor]:
        data = clock.note("data", data)
        x, y = clock.note("reduce", data)
        total = tf.ensure_shape(tf.numpy_function(slow, [tf.reduce_sum(x)], tf.float32), ())
        total = clock.note("reduced", total)
        return step((x + 0 * total, y))

    model.train_step = timed
    model.fit(batches(seconds), steps_per_epoch=STEPS, callbacks=[clock, *callbacks], shuffle=False, verbose=0)


def clock() -> StepClock:
    return StepClock(batch_size=BATCH, macs_per_image=3, matmul_peak=1e9, num_workers=2)


def test_where_the_time_of_a_step_goes() -> None:
    slow_data, slow_reduction = clock(), clock()
    train(PAUSE, 0.0, clock=slow_data)
    train(0.0, PAUSE, clock=slow_reduction)
    waits, reduces = slow_data.metrics(), slow_reduction.metrics()
    assert waits["data_wait_share"] > 0.6
    assert waits["all_reduce_share"] < 0.2
    assert reduces["all_reduce_share"] > 0.6
    assert reduces["data_wait_share"] < 0.2
    assert 1e3 * PAUSE <= reduces["all_reduce_ms"] <= reduces["step_ms"]


ONE_THREAD = """
import keras
import tensorflow as tf
from pipeline import multiworker
from pipeline.training.throughput import StepClock

tf.config.threading.set_inter_op_parallelism_threads(1)
clock = StepClock(batch_size=64, macs_per_image=1, matmul_peak=1.0)
model = keras.Sequential([keras.layers.Input((1024,)), *(keras.layers.Dense(1024) for _ in range(16))])
model.compile("sgd", "mse")
multiworker.enable(model, note=clock.note)
rows = tf.data.Dataset.from_tensors((tf.ones((64, 1024)), tf.ones((64, 1024)))).repeat().prefetch(2)
model.fit(rows, steps_per_epoch=6, callbacks=[clock], shuffle=False, verbose=0)
print(clock.metrics()["data_wait_share"])
"""


def test_the_clock_is_read_in_time_with_one_thread_too() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_THREAD], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Read at the end of the step, it would be 0.9.
    assert float(done.stdout) < 0.5


def test_rate_and_share_of_the_peak() -> None:
    measured = clock()
    train(PAUSE, 0.0, clock=measured)
    metrics = measured.metrics()
    assert measured.steps == STEPS - 1  # the first one is traced
    assert metrics["images_per_second"] == pytest.approx(1e3 * BATCH / metrics["step_ms"])
    assert 0.5 * BATCH / PAUSE < metrics["images_per_second"] < 1.01 * BATCH / PAUSE
    assert metrics["mfu"] == pytest.approx(FLOPS_PER_MAC * 3 * metrics["images_per_second"] / 2e9)
    assert metrics["num_workers"] == 2
    measured.macs_per_image = None
    assert measured.metrics() == {name: value for name, value in metrics.items() if name != "mfu"}


def test_an_epoch_without_a_timed_step_has_no_rate() -> None:
    measured = clock()
    measured.on_epoch_begin(0)
    assert measured.metrics() == {}
    assert measured.images_per_second == 0


def test_progress_is_reported_at_intervals() -> None:
    every_step: list[StepProgress] = []
    once: list[StepProgress] = []
    measured = clock()
    reporters = [
        StepReporter(measured, every_step.append, steps=STEPS + 4, every=0.0),
        StepReporter(measured, once.append, steps=STEPS + 4, every=3600.0),
    ]
    train(0.0, 0.0, *reporters, clock=measured)
    # An epoch of 10 steps that continues after the 4th: the second step here is the first that has a rate.
    assert [event.step for event in every_step] == [6, 7, 8, 9, 10]
    assert [event.step for event in once] == [6]
    for event in every_step:
        assert (event.epoch, event.steps) == (1, STEPS + 4)
        assert event.loss >= 0
        assert 0 <= event.accuracy <= 1
        assert event.images_per_second > 0


@pytest.mark.parametrize("products", [1, 2])
def test_the_peak_has_the_order_of_magnitude_of_numpy(products: int) -> None:
    peak = matmul_peak(seconds=0.2, products=products)
    matrix = np.ones((1024, 1024), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    # A wide range, since the machine may be busy; a wrong unit would be a factor of 1,000.
    assert 1 / 30 < peak / (2 * 1024**3 / min(seconds)) < 30
