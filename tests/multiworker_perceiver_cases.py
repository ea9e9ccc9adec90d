"""The cases of tests/multiworker_cases.py that train a Perceiver."""

from collections.abc import Callable

import keras
import numpy as np
from multiworker_setting import FIT, Result, case, enabled, twice
from sklearn.datasets import load_digits

from perceiver.model import Perceiver


def perceiver(optimizer: Callable[[], keras.optimizers.Optimizer], dropout: float = 0.0) -> Result:
    digits = load_digits()
    images, labels = (digits.images[:200] * 16).astype(np.uint8)[..., np.newaxis], digits.target[:200]
    model = enabled(
        lambda: Perceiver(
            image_shape=(8, 8, 1),
            num_classes=10,
            stem="patches",
            patch_size=2,
            data_dim=16,
            num_latents=4,
            latent_dim=16,
            num_self_attention_blocks=1,
            num_self_attention_heads=2,
            use_final_layer_norm=True,
            dropout=dropout,
            name="perceiver",
        ),
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(images, labels, **(FIT | {"batch_size": 40, "epochs": 3}))
    return history.history | {variable.path: variable.numpy() for variable in model.trainable_variables}


@case
def perceiver_sgd() -> Result:
    return perceiver(lambda: keras.optimizers.SGD(0.05, momentum=0.9))


@case
def perceiver_adamw() -> Result:
    return perceiver(lambda: keras.optimizers.AdamW(1e-3))


@case
def perceiver_lamb() -> Result:
    return perceiver(lambda: keras.optimizers.Lamb(1e-2))


@case
def perceiver_dropout() -> Result:
    return twice(lambda: perceiver(lambda: keras.optimizers.SGD(0.05), dropout=0.3))
