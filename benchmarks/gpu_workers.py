"""Several workers on the GPUs of this host, one each, as the pipeline starts them; for `benchmarks/gpu.py`."""

import os
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
from gpu_steps import Job
from local_workers import free_addresses, join_cluster
from turns import Answer, Contestant

ENDLESS = 10**6
"""More turns than there are."""


def images_per_second(job: Job, workers: int, use_gpu: bool, steps: int, turns: int) -> float:
    """Images/s of all workers together; each has `job.batch` images of a step. The fastest of `turns`."""
    addresses = free_addresses(workers)
    with ExitStack() as stack:
        team = []
        for rank in range(workers):
            contestant = Contestant(worker, job, rank, addresses, use_gpu, steps)
            stack.callback(contestant.end)
            team.append(contestant)
        for contestant in team:
            contestant.wait()
        rates = []
        for _ in range(turns):
            for contestant in team:
                contestant.begin()
            rates.append(workers * job.batch * steps / max(contestant.wait() for contestant in team))
    return max(rates)


def worker(answer: Answer, job: Job, rank: int, addresses: list[str], use_gpu: bool, steps: int) -> None:
    """Case of a `Contestant`: answers once when it is ready, then the seconds of each turn of `steps` steps."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank) if use_gpu else ""
    if len(addresses) > 1:
        join_cluster(addresses, rank)
    import keras
    import tensorflow as tf

    from perceiver.model import Perceiver
    from pipeline import multiworker
    from pipeline.devices import communication_options, multiply_on_gpu, require_gpu, set_up_tensorflow
    from pipeline.training.optimization import SmoothedCrossEntropy, optimizer

    set_up_tensorflow(max(1, len(os.sched_getaffinity(0)) // len(addresses)), use_gpu)
    if use_gpu:
        require_gpu("use_gpu")
    strategy = tf.distribute.get_strategy()
    if len(addresses) > 1:
        options = communication_options(use_gpu)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    if use_gpu:
        multiply_on_gpu("use_gpu")
    keras.config.set_dtype_policy(job.train.precision)
    with strategy.scope():
        model = Perceiver(**asdict(job.model))
        model.build((None, *job.model.image_shape))
        model.compile(
            optimizer(job.train, model, 1000),
            SmoothedCrossEntropy(job.train.label_smoothing),
            jit_compile=job.train.jit_compile,
        )
    multiworker.enable(model)
    rng = np.random.default_rng(rank)
    images = rng.integers(0, 256, (job.batch, *job.model.image_shape), dtype=np.uint8)
    labels = rng.integers(0, job.model.num_classes, job.batch, dtype=np.int32)
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat()
    data = multiworker.distribute(batches, strategy)
    began = 0.0

    class Turns(keras.callbacks.Callback):
        """An epoch is a turn; the first one, which traces, says that this worker is ready."""

        def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            nonlocal began
            began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            loss = (logs or {})["loss"]  # the numbers are on the host by now
            if not np.isfinite(loss):
                raise ValueError(f"the loss of {job.name} is {loss} after {steps * (epoch + 1)} steps")
            answer(time.perf_counter() - began)

    model.fit(data, epochs=ENDLESS, steps_per_epoch=steps, callbacks=[Turns()], verbose=0)
