"""How many images a second the host augments, and how many cores a device would need; for `benchmarks/gpu.py`."""

import time
from dataclasses import replace

import numpy as np
from gpu_steps import Job

from pipeline.data.rows import Rows
from pipeline.training.batches import train_batches

ROWS = 4096


def augmented_per_second(job: Job, seconds: float) -> float:
    """Images/s that one core augments with the settings of a job, in the generator that the training uses."""
    rng, count = np.random.default_rng(0), max(ROWS, job.batch) if job.model.image_shape[0] <= 64 else job.batch
    images = rng.integers(0, 256, (count, *job.model.image_shape), dtype=np.uint8)
    labels = rng.integers(0, job.model.num_classes, count, dtype=np.int32)
    settings = replace(job.train, global_batch_size=job.batch)
    batches = train_batches(
        Rows(np.arange(count), images, labels), settings, job.model.num_classes, rank=0, num_workers=1
    )
    next(batches)
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        next(batches)
        done += job.batch
    return done / spent
