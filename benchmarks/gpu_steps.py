"""Training steps of Perceivers on the device that is there; for `benchmarks/gpu.py`.

Each is traced and compiled in a process of its own, all at the same time, because that takes about a minute each and
computes on a core of the host. Only then are they timed, in turns.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from turns import Answer, Contestant

from perceiver import Perceiver, PerceiverConfig, presets
from perceiver.cost import macs_per_image, parameter_count
from perceiver.implementations import Implementations, using
from pipeline.devices import Precision, set_up_tensorflow
from pipeline.settings.presets import PRESETS
from pipeline.training.config import TrainingConfig
from pipeline.training.optimization import SmoothedCrossEntropy, optimizer
from pipeline.training.throughput import FLOPS_PER_MAC

LIBRARY = Implementations("library", "library", "library")
AUTOMATIC = Implementations("automatic", "library", "library")
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Job:
    """A model and how it is trained.

    Attributes:
        name: Name in the table.
        model: Settings of the model.
        train: Settings of the training.
        batch: Images of a step.
    """

    name: str
    model: PerceiverConfig
    train: TrainingConfig
    batch: int


@dataclass(frozen=True)
class Speed:
    """Speed of a training step."""

    job: str
    variant: str
    batch: int
    parameters: int
    images_per_second: float
    fastest: float
    mfu: float
    """Share of the peak of a large matrix product in the same dtype, on the same device."""
    is_finite: bool = True
    """Whether the loss was a number to the end."""


VARIANTS: dict[str, tuple[Implementations, bool]] = {
    "own": (Implementations(), False),
    "own, XLA": (Implementations(), True),
    "automatic gradients": (AUTOMATIC, False),
    "automatic gradients, XLA": (AUTOMATIC, True),
    "plain Keras": (LIBRARY, False),
    "plain Keras, XLA": (LIBRARY, True),
}
"""What computes attention, LayerNorm and GELU, and whether Keras compiles the step."""


def jobs(precision: Precision, smoke: bool) -> list[Job]:
    """The steps to be measured; with `smoke`, small ones of the same kinds."""
    train = replace(PRESETS["cifar100_gpu"]().train, precision=precision, use_gpu=False, num_workers=1)
    if not smoke:
        return [
            Job("cifar100_gpu", presets.cifar100_gpu(), train, train.global_batch_size),
            Job("paper_imagenet", presets.paper_imagenet(), replace(train, global_batch_size=16), 16),
            Job("cifar100", presets.cifar100(), replace(train, global_batch_size=128), 128),
        ]
    tiny: dict[str, Any] = {
        "latent_dim": 16,
        "num_latents": 4,
        "num_self_attention_blocks": 1,
        "num_cross_attention_heads": 1,
    }
    tiny |= {"num_self_attention_heads": 2, "num_iterations": 2}
    small = replace(presets.cifar100_gpu(), conv_channels=8, data_dim=16, **tiny)
    pixels = replace(presets.paper_imagenet(), image_shape=(16, 16, 3), num_classes=10, num_fourier_bands=4, **tiny)
    train = replace(train, global_batch_size=8)
    return [Job("cifar100_gpu, tiny", small, train, 8), Job("paper_imagenet, tiny", pixels, train, 4)]


def measure_steps(
    cases: Sequence[tuple[Job, str]], peak: float, use_gpu: bool, steps: int, turns: int
) -> Iterator[Speed]:
    """Yields the speed of each case, over `turns` of `steps` steps each.

    Args:
        cases: Jobs and one of `VARIANTS` each; all are compiled before the first is timed.
        peak: FLOP/s of a large matrix product.
        use_gpu: Whether to compute on the first GPU.
        steps: Steps of a turn, which ends when the device has finished.
        turns: Number of turns; the speed is the median.
    """
    with ExitStack() as stack:
        contestants = []
        for job, variant in cases:
            contestants.append(Contestant(time_steps, job, variant, use_gpu, steps))
            stack.callback(contestants[-1].end)
        for contestant in contestants:
            contestant.wait()
        turns_of_all = [[contestant.turn() for contestant in contestants] for _ in range(turns)]
    for (job, variant), own in zip(cases, zip(*turns_of_all, strict=True), strict=True):
        rates = [job.batch * steps / seconds for seconds, _ in own]
        speed = speed_of(job, variant, parameter_count(job.model), rates, peak)
        yield replace(speed, is_finite=all(math.isfinite(loss) for _, loss in own))


def time_steps(answer: Answer, job: Job, variant: str, use_gpu: bool, steps: int) -> None:
    """Case of a `Contestant`: answers once when the step is compiled, then seconds and loss of each turn of `steps`."""
    set_up_tensorflow(len(os.sched_getaffinity(0)), use_gpu)
    implementations, jit_compile = VARIANTS[variant]
    with using(implementations):
        step = training_step(job, jit_compile)
        for _ in range(WARM_UP_STEPS):
            step()
        answer(None)
        while True:
            answer(_time(step, steps))


def speed_of(job: Job, variant: str, parameters: int, rates: list[float], peak: float) -> Speed:
    median = statistics.median(rates)
    mfu = FLOPS_PER_MAC * macs_per_image(job.model) * median / peak
    return Speed(job.name, variant, job.batch, parameters, median, max(rates), mfu)


def training_step(job: Job, jit_compile: bool) -> Callable[[], object]:
    """A function that runs a step as `fit` does, on a batch that stays on the device; it returns the loss."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(job.train.precision)
    model = Perceiver(**asdict(job.model))
    model.build((None, *job.model.image_shape))
    loss = SmoothedCrossEntropy(job.train.label_smoothing)
    model.compile(optimizer(job.train, model, 1000), loss, jit_compile=jit_compile)
    keras.config.set_dtype_policy("float32")
    batch = tuple(map(tf.constant, noise(job)))
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    model.make_train_function()
    return lambda: model.train_function(batches)["loss"]


def noise(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (job.batch, *job.model.image_shape), dtype=np.uint8)
    return images, rng.integers(0, job.model.num_classes, job.batch, dtype=np.int32)


def _time(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Seconds of some steps, and the loss of the last one."""
    start = time.perf_counter()
    for _ in range(steps):
        result = step()
    loss = float(np.asarray(result))  # waits for the device
    return time.perf_counter() - start, loss
