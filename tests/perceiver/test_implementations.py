"""Every implementation of attention, LayerNorm and GELU gives the values and gradients of the package's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from perceiver import implementations as module
from perceiver.attention import MultiHeadAttention
from perceiver.blocks import MLP
from perceiver.implementations import CHOICES, Implementations, chosen_for, implementations, using
from perceiver.normalization import LayerNorm

_RANDOM = np.random.default_rng(0)
_ROWS = _RANDOM.normal(size=(2, 5, 8)).astype("float32")
_DATA = _RANDOM.normal(size=(2, 13, 6)).astype("float32")


def results(layer: keras.layers.Layer, *inputs: np.ndarray) -> list[np.ndarray]:
    """Output of a layer and the gradients of its inputs and weights."""
    tensors = [tf.constant(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = layer(*tensors)
        loss = tf.reduce_sum(tf.sin(outputs))
    gradients = tape.gradient(loss, [*tensors, *(v.value for v in layer.trainable_variables)])
    return [x.numpy() for x in (outputs, *gradients)]


@pytest.mark.parametrize(
    ("make", "inputs", "other"),
    [
        (lambda: MultiHeadAttention(2, 4, 6, 8), (_ROWS, _DATA), Implementations(attention="automatic")),
        (lambda: MultiHeadAttention(2, 4, 6, 8), (_ROWS, _DATA), Implementations(attention="library")),
        (lambda: MultiHeadAttention(1, 4, 6, None), (_ROWS, _DATA[:, :2]), Implementations(attention="automatic")),
        (lambda: LayerNorm(epsilon=1e-5), (_ROWS,), Implementations(layer_norm="library")),
        (lambda: MLP(2), (_ROWS,), Implementations(gelu="library")),
        (lambda: MLP(2, approximate_gelu=True), (_ROWS,), Implementations(gelu="library")),
    ],
)
def test_values_and_gradients_are_those_of_the_own(make, inputs, other) -> None:  # type: ignore[no-untyped-def]
    layer = make()
    layer(*inputs)
    expected = results(layer, *inputs)
    with using(other):
        assert implementations() == other
        found = results(layer, *inputs)
    assert implementations() == Implementations()
    for mine, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_the_choice_follows_backend_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementations() == CHOICES["tensorflow", "cpu"], "the tests run on a CPU"
    flash = Implementations(attention="library")
    monkeypatch.setitem(CHOICES, ("tensorflow", "gpu"), flash)
    monkeypatch.setattr(module, "_device", lambda: "gpu")
    assert implementations() == flash
    assert chosen_for("tensorflow", "cpu") == Implementations()
    assert chosen_for("another", "npu") == Implementations()
