"""Every implementation of a part of the model gives the values and gradients of the package's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from perceiver import implementations as module
from perceiver.attention import MultiHeadAttention
from perceiver.blocks import MLP
from perceiver.implementations import CHOICES, Implementations, chosen_for, implementations, using
from perceiver.normalization import LayerNorm
from perceiver.preprocessing import ConvStem

_RANDOM = np.random.default_rng(0)
_ROWS = _RANDOM.normal(size=(2, 5, 8)).astype("float32")
_DATA = _RANDOM.normal(size=(2, 13, 6)).astype("float32")
_IMAGES = _RANDOM.normal(size=(64, 8, 8, 3)).astype("float32")


@pytest.fixture(autouse=True)
def processor_of_any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bfloat16_kernels", lambda: True)


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


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_convolutions_in_float32_are_as_exact_as_those_in_16_bits(policy: str) -> None:
    stem, exact = (ConvStem(2, 8, units=16, num_residuals=1, dtype=dtype) for dtype in (policy, "float32"))
    for each in (stem, exact):
        each(_IMAGES)
    for variable, other in zip(stem.trainable_variables, exact.trainable_variables, strict=True):
        variable.assign(_RANDOM.normal(size=variable.shape) / 4)  # biases are zero at first
        other.assign(variable)
    half = tf.as_dtype(stem.compute_dtype)

    def traced(layer: ConvStem, training: bool) -> tuple[set[tf.DType], list[tf.Tensor]]:
        """Dtypes of the convolutions in the graph of a step; the rows, and the gradients of the weights."""

        @tf.function
        def step() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                rows = tf.cast(layer(_IMAGES, training=training), tf.float32)
                loss = tf.reduce_mean(tf.sin(rows))
            return [rows, *tape.gradient(loss, [v.value for v in layer.trainable_variables])]

        operations = step.get_concrete_function().graph.get_operations()
        return {each.get_attr("T") for each in operations if each.type.startswith("Conv2D")}, step()

    _, expected = traced(exact, training=True)
    dtypes, in_half = traced(stem, training=True)
    assert dtypes == {half}
    with using(Implementations(convolution="float32")):
        dtypes, found = traced(stem, training=True)
        assert dtypes == {tf.float32}
        assert traced(stem, training=False)[0] == {half}, "only the gradients are slow"
    for correct, other, mine in zip(expected, in_half, found, strict=True):
        assert mine.dtype == correct.dtype
        error, that_of_half = (np.linalg.norm(each - correct) / np.linalg.norm(correct) for each in (mine, other))
        assert error < 1.5 * that_of_half


def test_the_choice_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bfloat16_kernels", lambda: False)
    assert implementations() == Implementations(convolution="float32")
    monkeypatch.setattr(module, "_device", lambda: "gpu")
    assert implementations() == Implementations()


def test_the_choice_follows_backend_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementations() == CHOICES["tensorflow", "cpu"], "the tests run on a CPU"
    flash = Implementations(attention="library")
    monkeypatch.setitem(CHOICES, ("tensorflow", "gpu"), flash)
    monkeypatch.setattr(module, "_device", lambda: "gpu")
    assert implementations() == flash
    assert chosen_for("tensorflow", "cpu") == Implementations()
    assert chosen_for("another", "npu") == Implementations()
