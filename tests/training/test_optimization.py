"""Loss, metrics, optimizers and learning-rate schedules."""

from dataclasses import asdict, replace
from typing import Any, Literal

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_perceivers import TINY

from perceiver import Perceiver
from pipeline.training.config import TrainingConfig
from pipeline.training.muon import Muon
from pipeline.training.optimization import (
    Accuracy,
    SmoothedCrossEntropy,
    TopKAccuracy,
    balanced_weights,
    learning_rate,
    optimizer,
)

OptimizerName = Literal["adam", "adamw", "lamb", "muon", "sgd"]
CONFIG = TrainingConfig(learning_rate=0.1, learning_rate_schedule="constant", weight_decay=0.5)


def small_perceiver() -> Perceiver:
    model = Perceiver(**asdict(TINY["conv"]))
    model.build()
    return model


@pytest.mark.parametrize(
    ("name", "decays"),
    [("adamw", True), ("sgd", True), ("lamb", True), ("muon", True), ("adam", False)],
    ids=lambda value: str(value),
)
def test_weight_decay_acts_on_kernels_alone(
    name: Literal["adam", "adamw", "lamb", "muon", "sgd"], decays: bool
) -> None:
    model = small_perceiver()
    model.set_weights([np.ones(weight.shape) for weight in model.weights])
    config = replace(CONFIG, optimizer=name, weight_decay=0.5 if decays else 0.0)
    made = optimizer(config, model, steps_per_epoch=10)
    variables = model.trainable_variables
    made.apply([tf.zeros(variable.shape) for variable in variables], variables)
    for variable in variables:
        # Without a gradient, only the decay moves a weight: w - learning rate * decay * w.
        expected = 0.95 if decays and variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable, np.full(variable.shape, expected), rtol=1e-6, err_msg=variable.path)


def test_muon_is_for_the_matrices_and_convolutions_within_the_model() -> None:
    """Muon's step is (nearly) orthogonal, that of Adam has, at first, the learning rate in every element."""
    model = small_perceiver()
    made = optimizer(replace(CONFIG, optimizer="muon", weight_decay=0.0), model, steps_per_epoch=10)
    variables, random = model.trainable_variables, np.random.default_rng(0)
    before = [variable.numpy() for variable in variables]
    made.apply([tf.constant(random.normal(size=v.shape), v.dtype) for v in variables], variables)
    muons = []
    for variable, value in zip(variables, before, strict=True):
        step = (value - variable.numpy()) / 0.1
        if np.allclose(np.abs(step), 1, atol=0.05):
            continue
        muons.append(variable)
        step = step.reshape(-1, step.shape[-1])
        singular = np.linalg.svd(step / (0.2 * np.sqrt(max(step.shape))), compute_uv=False)
        assert 0.5 < singular.min() <= singular.max() < 1.3, variable.path
    kernels = [v for v in variables if v.name == "kernel" and v is not model.logits.kernel]
    assert {v.ndim for v in kernels} == {2, 4}
    assert [v.path for v in muons] == [v.path for v in kernels], "not the latents, nor the classifier"


def test_fewer_steps_of_muon_orthogonalise_less_precisely() -> None:
    def spread(steps: int) -> float:
        """The highest singular value of the first update of a kernel, divided by the lowest."""
        model = small_perceiver()
        made = optimizer(replace(CONFIG, optimizer="muon", weight_decay=0.0, muon_steps=steps), model, 10)
        kernel = model.cross_attends[0].mlp.hidden.kernel
        before, random = kernel.numpy(), np.random.default_rng(0)
        variables = model.trainable_variables
        made.apply([tf.constant(random.normal(size=v.shape), v.dtype) for v in variables], variables)
        singular = np.linalg.svd(before - kernel.numpy(), compute_uv=False)
        return singular.max() / singular.min()

    spreads = [spread(steps) for steps in (1, 3, 5)]
    assert max(spreads[1:]) < 2 < 3 < spreads[0]


@pytest.mark.parametrize("shape", [(24, 24), (24, 48), (48, 24)])
def test_muon_orthogonalises_as_that_of_keras(shape: tuple[int, int]) -> None:
    matrix = tf.constant(np.random.default_rng(0).normal(size=shape), "float32")
    found, expected = (
        np.asarray(kind(0.1).zeropower_via_newtonschulz5(matrix, 5)) for kind in (Muon, keras.optimizers.Muon)
    )
    kernel = tf.reshape(matrix, (2, 2, -1, shape[1]))
    np.testing.assert_array_equal(
        tf.reshape(Muon(0.1).zeropower_via_newtonschulz5(kernel, 5), shape), found, "as a convolution's kernel"
    )
    assert found.dtype == expected.dtype
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.998
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"rms_rate": None}, {"weight_decay": 0.1}])
def test_muon_updates_as_that_of_keras(options: dict[str, Any]) -> None:
    """Over several steps, up to the precision of bfloat16, whose part the test above has."""
    random = np.random.default_rng(0)
    start = {"tall": (48, 24), "wide": (24, 48), "vector": (24,)}
    gradients = [[random.normal(size=shape).astype("float32") for shape in start.values()] for _ in range(4)]

    def updates(kind: type[keras.optimizers.Muon]) -> list[np.ndarray]:
        made = kind(0.01, **options)
        variables = [keras.Variable(np.ones(shape, "float32"), name=name) for name, shape in start.items()]
        for step in gradients:
            made.apply([tf.constant(gradient) for gradient in step], variables)
        return [variable.numpy() - 1 for variable in variables]

    for name, found, expected in zip(start, updates(Muon), updates(keras.optimizers.Muon), strict=True):
        difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert difference < (1e-6 if name == "vector" else 0.05), name


def test_smoothing_is_that_of_one_hot_labels() -> None:
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 5, 7), random.normal(size=(7, 5)).astype("float32")
    for smoothing in (0.0, 0.2):
        expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
        found = SmoothedCrossEntropy(smoothing)
        for truth in (np.eye(5)[labels], random.dirichlet(np.ones(5), 7).astype("float32")):
            np.testing.assert_allclose(found(truth, logits), expected(truth, logits), rtol=1e-6)
        np.testing.assert_allclose(found(labels, logits), expected(np.eye(5)[labels], logits), rtol=1e-6)
    assert SmoothedCrossEntropy.from_config(SmoothedCrossEntropy(0.2).get_config()).label_smoothing == 0.2


def test_classes_with_balanced_weights_count_alike() -> None:
    counts = [600, 30, 0, 10]
    weights = balanced_weights(counts)
    assert [weight * count for weight, count in zip(weights, counts, strict=True)] == pytest.approx(
        [640 / 3, 640 / 3, 0, 640 / 3]
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
def test_weighted_losses_and_gradients_are_those_of_the_plain_formula(mixed: bool, smoothing: float) -> None:
    """The loss of each class as the label, times its weight, times its share of the image."""
    random, weights = np.random.default_rng(0), [0.2, 3.0, 1.0, 0.0, 0.7]
    one_hot = np.eye(5, dtype="float32")
    shares = random.dirichlet(np.ones(5), 7).astype("float32") if mixed else one_hot[[0, 1, 1, 3, 2, 4, 0]]
    logits = tf.Variable(random.normal(size=(7, 5)).astype("float32"))
    truth = shares if mixed else shares.argmax(axis=1).astype("int32")
    with tf.GradientTape(persistent=True) as tape:
        found = SmoothedCrossEntropy(smoothing, weights)(truth, logits)
        plain = [
            keras.losses.categorical_crossentropy(
                np.tile(one_hot[k], (7, 1)), logits, from_logits=True, label_smoothing=smoothing
            )
            for k in range(5)
        ]
        expected = sum(tf.reduce_mean(weights[k] * shares[:, k] * plain[k]) for k in range(5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(found, logits), tape.gradient(expected, logits), atol=1e-6)


def test_without_weights_of_classes_the_loss_has_the_bits_of_keras() -> None:
    random = np.random.default_rng(0)
    logits = tf.constant(random.normal(size=(64, 5)).astype("float32"))
    labels = random.integers(0, 5, 64)
    expected = keras.losses.categorical_crossentropy(
        keras.ops.one_hot(labels, 5, dtype="float32") * (1 - 0.1) + 0.1 / 5, logits, from_logits=True
    )
    np.testing.assert_array_equal(SmoothedCrossEntropy(0.1, reduction=None)(labels, logits), expected)
    again = SmoothedCrossEntropy.from_config(SmoothedCrossEntropy(0.1, [1, 2]).get_config())
    assert (again.label_smoothing, again.class_weights) == (0.1, [1, 2])


def test_of_a_mixed_image_the_larger_part_is_the_label() -> None:
    logits = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0]], "float32")
    targets = np.array([[0.7, 0.3, 0, 0], [0, 0, 0.6, 0.4], [0.4, 0, 0, 0.6]], "float32")
    for truth in (targets, np.array([0, 2, 3])):
        for metric, expected in ((Accuracy(), 1 / 3), (TopKAccuracy(2), 2 / 3), (TopKAccuracy(4), 1)):
            metric.update_state(truth, logits)
            assert float(metric.result()) == pytest.approx(expected)


def test_equal_logits_are_no_accuracy() -> None:
    metric = Accuracy()
    metric.update_state(np.arange(4), np.zeros((4, 4), "float32"))
    assert float(metric.result()) == 0.25


def test_cosine_warms_up_and_ends_at_zero() -> None:
    config = replace(CONFIG, learning_rate_schedule="cosine", epochs=4, warmup_epochs=1.0)
    rate = learning_rate(config, steps_per_epoch=10)
    rates = [float(rate(step)) for step in range(41)]  # type: ignore[operator]
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.1, 11), atol=1e-7)
    np.testing.assert_allclose(rates[25], 0.05, atol=1e-7)
    np.testing.assert_allclose(rates[40], 0, atol=1e-7)
    assert learning_rate(CONFIG, steps_per_epoch=10) == 0.1
