"""Compares what XLA compiles of a training step with the plain operations, started by test_gpu.py.

    python tests/gpu/compiled_steps.py gradients|update|losses BATCH

It uses the model and the recipe of the preset `cifar100_gpu`, on the device that is there. The line that it prints is
JSON: `difference` of all variables together, relative to their norm (`gradients`, `update`), or `losses` of a plain and
of a compiled training, with dropout. It is NaN where a number is not finite.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from perceiver import Perceiver, presets
from pipeline import multiworker
from pipeline.devices import load_cusolver, set_up_tensorflow, used_device
from pipeline.settings.presets import PRESETS
from pipeline.training.optimization import SmoothedCrossEntropy, optimizer

STEPS = 5
STEPS_PER_EPOCH = 10
"""Of the schedule: the rate rises to 8% of the highest within `STEPS`."""
Arrays = Sequence[np.ndarray]


def main(part: str, batch: int) -> None:
    load_cusolver()
    set_up_tensorflow(2, bool(tf.config.list_physical_devices("GPU")))
    result: dict[str, Any]
    if part == "losses":
        result = {"losses": [losses(xla, batch) for xla in (False, True)]}
    else:
        plain, compiled = ({"gradients": gradients, "update": update}[part](xla, batch) for xla in (False, True))
        result = {"difference": difference(compiled, plain)}
    print(json.dumps(result | {"device": used_device()}), flush=True)


def model_of(dropout: float) -> keras.Model:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = Perceiver(**asdict(replace(presets.cifar100_gpu(), dropout=dropout)))
    model.build((None, *presets.cifar100_gpu().image_shape))
    return model


def noise(batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *presets.cifar100_gpu().image_shape), dtype=np.uint8)
    return images, rng.integers(0, 100, batch, dtype=np.int32)


def gradients(xla: bool, batch: int) -> Arrays:
    """Of the loss, without dropout, whose random numbers XLA may draw in another order."""
    model, (images, labels) = model_of(dropout=0.0), noise(batch)
    loss = SmoothedCrossEntropy(0.1)

    @tf.function(jit_compile=xla, autograph=False)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        return tape.gradient(value, [variable.value for variable in model.trainable_variables])

    return [np.asarray(gradient) for gradient in step(tf.constant(images), tf.constant(labels))]


def update(xla: bool, batch: int) -> Arrays:
    """Changes of the weights by `STEPS` updates with random gradients."""
    model = model_of(dropout=0.0)
    made = optimizer(PRESETS["cifar100_gpu"]().train, model, STEPS_PER_EPOCH)
    made.build(model.trainable_variables)
    before = [np.asarray(variable) for variable in model.trainable_variables]
    rng = np.random.default_rng(1)
    random = [tf.constant(1e-3 * rng.standard_normal(weight.shape), tf.float32) for weight in before]

    @tf.function(jit_compile=xla, autograph=False)
    def step(gradients: Any) -> None:
        made.apply(gradients, model.trainable_variables)

    for _ in range(STEPS):
        step(random)
    return [np.asarray(after) - start for after, start in zip(model.trainable_variables, before, strict=True)]


def losses(xla: bool, batch: int) -> list[float]:
    """Of the steps of a training as the pipeline's."""
    model, train = model_of(dropout=0.1), PRESETS["cifar100_gpu"]().train
    loss = SmoothedCrossEntropy(train.label_smoothing)
    model.compile(optimizer(train, model, STEPS_PER_EPOCH), loss, jit_compile=xla)
    multiworker.enable(model)
    batches = tf.data.Dataset.from_tensors(noise(batch)).repeat()
    found: list[float] = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            found.append(float((logs or {})["loss"]))

    data = multiworker.distribute(batches, tf.distribute.get_strategy())
    model.fit(data, epochs=STEPS, steps_per_epoch=1, callbacks=[Note()], verbose=0)
    return found


def difference(found: Arrays, expected: Arrays) -> float:
    """Of all variables together, relative to their norm; NaN if a number is not finite.

    Not of each variable: in bfloat16 the gradients of queries and keys are rounding at the start of a training, when
    all latents attend to all inputs alike.
    """
    mine, other = (np.concatenate([x.ravel() for x in arrays]) for arrays in (found, expected))
    return float(np.linalg.norm(mine - other) / np.linalg.norm(other))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
