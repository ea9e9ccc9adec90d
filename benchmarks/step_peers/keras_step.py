"""A process that trains the Perceiver in Keras, on the backend of KERAS_BACKEND.

keras_step.py PRESET PRECISION BATCH adamw|muon parts|xla

With `parts` it computes as this project's workers do, on each core a part of the batch (pipeline/training/parts.py).
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np
from timed_steps import run

sys.path.append(str(Path(__file__).parents[2]))

from perceiver import Perceiver, presets
from perceiver.config import PerceiverConfig


def main() -> None:
    preset, precision, batch, optimizer_name, way = sys.argv[1:]
    config = getattr(presets, preset)()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    if way == "parts":
        model = _model_in_parts(config)
    else:
        model = Perceiver(**asdict(config))
        model.build()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (int(batch), *config.image_shape), dtype=np.uint8)
    labels = random.integers(0, config.num_classes, int(batch), dtype=np.int32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(_optimizer(optimizer_name, model), loss, jit_compile=way == "xla")
    run(lambda: float(model.train_on_batch(images, labels)), model.count_params())


def _model_in_parts(config: PerceiverConfig) -> Perceiver:
    # Only the project's own environment has what this needs.
    from pipeline.devices import set_up_tensorflow
    from pipeline.training.config import TrainingConfig
    from pipeline.training.parts import compute_in_parts, num_parts

    threads = len(os.sched_getaffinity(0))
    parts = num_parts(config, TrainingConfig(num_workers=1, cpus_per_worker=threads))
    set_up_tensorflow(threads, use_gpu=False, divides_operations=parts == 1)
    model = Perceiver(**asdict(config))
    model.build()
    if parts > 1:
        compute_in_parts(model, parts)
    return model


def _optimizer(name: str, model: keras.Model) -> keras.optimizers.Optimizer:
    if name == "adamw":
        return keras.optimizers.AdamW(1e-3, weight_decay=0.05)
    from pipeline.settings.presets import PRESETS
    from pipeline.training.optimization import optimizer

    return optimizer(PRESETS["cifar100"]().train, model, steps_per_epoch=352)


if __name__ == "__main__":
    main()
