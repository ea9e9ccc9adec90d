"""Loss, optimizers and schedules; that weight decay, which the published example names and never uses, decays."""

from dataclasses import replace
from typing import Literal

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.config import TrainingConfig
from pipeline.optimization import SmoothedCrossEntropy, learning_rate, optimizer

CONFIG = TrainingConfig(learning_rate=0.1, learning_rate_schedule="constant", weight_decay=0.5)


@pytest.mark.parametrize(
    ("name", "decays"), [("adamw", True), ("sgd", True), ("lamb", True), ("adam", False)], ids=lambda value: str(value)
)
def test_weight_decay_acts_on_kernels_alone(name: Literal["adam", "adamw", "lamb", "sgd"], decays: bool) -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2), keras.layers.LayerNormalization()])
    model.set_weights([np.ones(weight.shape) for weight in model.weights])
    config = replace(CONFIG, optimizer=name, weight_decay=0.5 if decays else 0.0)
    made = optimizer(config, model, steps_per_epoch=10)
    variables = model.trainable_variables
    made.apply([tf.zeros(variable.shape) for variable in variables], variables)
    for variable in variables:
        # Without a gradient nothing but the decay moves a weight: w - learning rate * decay * w.
        expected = 0.95 if decays and variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable, np.full(variable.shape, expected), rtol=1e-6, err_msg=variable.path)


def test_smoothing_is_that_of_one_hot_labels() -> None:
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 5, 7), random.normal(size=(7, 5)).astype("float32")
    for smoothing in (0.0, 0.2):
        expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
        found = SmoothedCrossEntropy(smoothing)
        np.testing.assert_allclose(found(labels, logits), expected(np.eye(5)[labels], logits), rtol=1e-6)
    assert SmoothedCrossEntropy.from_config(SmoothedCrossEntropy(0.2).get_config()).label_smoothing == 0.2


def test_cosine_warms_up_and_ends_at_zero() -> None:
    config = replace(CONFIG, learning_rate_schedule="cosine", epochs=4, warmup_epochs=1.0)
    rate = learning_rate(config, steps_per_epoch=10)
    rates = [float(rate(step)) for step in range(41)]  # type: ignore[operator]
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.1, 11), atol=1e-7)
    np.testing.assert_allclose(rates[25], 0.05, atol=1e-7)
    np.testing.assert_allclose(rates[40], 0, atol=1e-7)
    assert learning_rate(CONFIG, steps_per_epoch=10) == 0.1
