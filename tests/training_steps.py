"""Ten training steps under the Keras backend of the environment: `python training_steps.py WEIGHTS.npz`.

The model has what could differ between backends: convolutions, pooling, chunks, recomputation, a query head. Prints
the losses as JSON.
"""

import json
import sys
from dataclasses import asdict, replace

import keras
import numpy as np
from tiny_perceivers import BASE

from perceiver import Perceiver

CONFIG = replace(
    BASE,
    stem="conv",
    position_encoding="fourier",
    position_combination="concat",
    num_fourier_bands=2,
    share_first_cross_attention=True,
    attention_chunk_size=3,
    remat=True,
    head="query",
)


def losses_from(weights: list[np.ndarray]) -> list[float]:
    """Losses of ten steps of gradient descent with momentum on one batch."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (16, *CONFIG.image_shape)).astype("uint8"), random.integers(0, 5, 16)
    model = Perceiver(**asdict(CONFIG))
    model.build()
    model.set_weights(weights)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=keras.backend.backend() == "jax")
    return [float(model.train_on_batch(images, labels)) for _ in range(10)]


if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        print(json.dumps(losses_from([file[f"arr_{i}"] for i in range(len(file.files))])))
