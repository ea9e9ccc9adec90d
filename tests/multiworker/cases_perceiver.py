"""The Perceiver of this project"""

from collections.abc import Callable

import keras
import numpy as np
from case_registry import FIT, Result, Worker, case
from sklearn.datasets import load_digits

from perceiver.model import Perceiver


def trained(worker: Worker, optimizer: Callable[[], keras.optimizers.Optimizer], dropout: float = 0.0) -> Result:
    """Losses and weights of three epochs on digits."""
    digits = load_digits()
    images, labels = (digits.images[:200] * 16).astype(np.uint8)[..., np.newaxis], digits.target[:200]
    model = worker.compiled(
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
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer,
        metrics=["accuracy"],
    )
    history = model.fit(images, labels, **(FIT | {"batch_size": 40, "epochs": 3}))
    assert history.history["loss"][-1] < history.history["loss"][0] - 0.03
    # A key's bias shifts all logits of a query alike, so its true gradient is zero. AdamW and LAMB divide the rounding
    # error by its own size.
    weights = {v.path: v.numpy() for v in model.trainable_variables if not v.path.endswith("key/bias")}
    return history.history | weights


@case(workers=(2, 4))
def perceiver_with_momentum(worker: Worker) -> Result:
    """Perceiver with SGD and momentum"""
    return trained(worker, lambda: keras.optimizers.SGD(0.05, momentum=0.9))


@case(workers=(2, 4))
def perceiver_with_adamw(worker: Worker) -> Result:
    """Perceiver with AdamW"""
    return trained(worker, lambda: keras.optimizers.AdamW(1e-3))


@case(workers=(2, 4))
def perceiver_with_lamb(worker: Worker) -> Result:
    """Perceiver with LAMB"""
    return trained(worker, lambda: keras.optimizers.Lamb(1e-2))


@case(workers=(2, 4), stock=False, learns=False)
def perceiver_with_dropout(worker: Worker) -> Result:
    """Perceiver with dropout: two runs give the same bits"""
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        runs.append(trained(worker, lambda: keras.optimizers.SGD(0.05), dropout=0.3))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(value, runs[1][name], err_msg=name)
    return {"repeated": True}
