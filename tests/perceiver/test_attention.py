"""Attention and the two blocks against a NumPy reference; chunks, masks, rematerialisation, dropout seeds."""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import numpy_perceiver as reference
import pytest
import tensorflow as tf
from layer_checks import check_layer

from perceiver.attention import MultiHeadAttention
from perceiver.blocks import MLP, CrossAttentionBlock, SelfAttentionBlock
from perceiver.chunked_attention import chunked_attention, even_chunk_size
from perceiver.dot_product_attention import dot_product_attention

_RANDOM = np.random.default_rng(0)
_LATENTS = _RANDOM.normal(size=(2, 5, 8)).astype("float32")
_DATA = _RANDOM.normal(size=(2, 13, 6)).astype("float32")
_KEY_MASK = _RANDOM.random((2, 13)) < 0.5
_PAIR_MASK = _RANDOM.random((2, 5, 13)) < 0.5


def weights_of(layer: keras.layers.Layer, seed: int = 1) -> dict[str, np.ndarray]:
    """Sets random weights, biases included, in a built layer; returns them by path."""
    random = np.random.default_rng(seed)
    layer.set_weights([random.normal(size=w.shape, scale=0.3).astype("float32") for w in layer.weights])
    return {w.path: w.numpy().astype("float64") for w in layer.weights}


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("mask", [None, _KEY_MASK, _PAIR_MASK])
def test_cross_attend_equals_numpy(num_heads: int, mask: np.ndarray | None) -> None:
    block = CrossAttentionBlock(num_heads, qk_dim=4, v_dim=10, widening_factor=3, name="block")
    block.build(_LATENTS.shape, _DATA.shape)
    weights = weights_of(block)
    outputs, maps = block(_LATENTS, _DATA, attention_mask=mask, return_weights=True)
    np.testing.assert_allclose(block(_LATENTS, _DATA, attention_mask=mask), outputs, atol=1e-6)
    for i in range(2):
        image_mask = None if mask is None else np.broadcast_to(mask[i], (5, 13))
        expected, expected_maps = reference.cross_attend(weights, "block", _LATENTS[i], _DATA[i], num_heads, image_mask)
        np.testing.assert_allclose(outputs[i], expected, atol=1e-5)
        np.testing.assert_allclose(maps[i], expected_maps, atol=1e-5)


def test_self_attend_equals_numpy() -> None:
    block = SelfAttentionBlock(2, widening_factor=2, name="block")
    block.build(_LATENTS.shape)
    weights = weights_of(block)
    for latents, outputs in zip(_LATENTS, block(_LATENTS), strict=True):
        np.testing.assert_allclose(outputs, reference.self_attend(weights, "block", latents, 2), atol=1e-5)


def test_latents_of_a_batch_of_one_broadcast_to_all_images() -> None:
    block = CrossAttentionBlock(2)
    repeated = block(np.repeat(_LATENTS[:1], 2, axis=0), _DATA)
    np.testing.assert_allclose(block(_LATENTS[:1], _DATA), repeated, atol=1e-6)


def test_keys_and_values_may_be_computed_separately() -> None:
    block = CrossAttentionBlock(2)
    expected = block(_LATENTS, _DATA)
    np.testing.assert_allclose(block(_LATENTS, None, block.keys_values(_DATA)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("chunk_size", "mask", "mode"),
    [(size, mask, "eager") for size in (1, 4, 13, 50) for mask in (None, _KEY_MASK, _PAIR_MASK)]
    + [(4, None, "graph"), (4, _PAIR_MASK, "graph")],
)
def test_chunks_change_neither_values_nor_gradients(chunk_size: int, mask: np.ndarray | None, mode: str) -> None:
    plain = MultiHeadAttention(2, 8, 4, 6)
    chunked = MultiHeadAttention.from_config({**plain.get_config(), "chunk_size": chunk_size})
    for layer in (plain, chunked):
        layer.build(_LATENTS.shape, _DATA.shape)
        weights_of(layer)
    chunked_call = chunked if mode == "eager" else tf.function(chunked)
    for latents in (_LATENTS, _LATENTS[:1]):
        expectations = _values_and_gradients(plain, plain, latents, mask)
        results = _values_and_gradients(chunked_call, chunked, latents, mask)
        for expected, result in zip(expectations, results, strict=True):
            np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_keys", "chunk_size", "expected"),
    [(50176, 4096, 3584), (50176, 1024, 1024), (13, 4, 4), (12, 5, 4), (6, 50, 50), (30, 50, 30), (7, 1, 1)],
)
def test_chunks_are_even_where_they_can_be(num_keys: int, chunk_size: int, expected: int) -> None:
    assert even_chunk_size(num_keys, chunk_size) == expected


def test_chunks_may_hold_a_logit_far_above_all_others() -> None:
    """The weights of the first keys of a chunk underflow, so that its log-sum-exp needs the maximum over all keys."""
    random = np.random.default_rng(2)
    queries, keys, values = (random.normal(size=(1, 1, n, 4)).astype("float32") for n in (3, 200, 200))
    keys[:, :, [90, 170]] = 60 * np.sign(queries.sum(2, keepdims=True))
    logits = queries[0, 0].astype("float64") @ keys[0, 0].astype("float64").T
    assert logits.max() - logits[:, :64].max() > 100
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True) @ values[0, 0]
    for mode in (chunked_attention, tf.function(chunked_attention)):
        outputs = mode(tf.constant(queries), tf.constant(keys), tf.constant(values), None, 100)
        np.testing.assert_allclose(outputs[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_own_backward_pass_equals_automatic_differentiation(dtype: str, tolerance: float) -> None:
    random = np.random.default_rng(3)
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)]
    inputs = [tf.cast(tf.constant(random.normal(size=shape), "float32"), dtype) for shape in shapes]

    def plain(queries: tf.Tensor, keys: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        return tf.nn.softmax(queries @ tf.linalg.matrix_transpose(keys)) @ values

    def results(function: Callable, inputs: list[tf.Tensor]) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
            loss = tf.reduce_sum(tf.sin(outputs))
        return [tf.cast(x, "float32").numpy() for x in (outputs, *tape.gradient(loss, inputs))]

    # The plain formula in float64, from inputs rounded to `dtype`.
    expected = results(plain, [tf.cast(x, "float64") for x in inputs])
    for function in (dot_product_attention, tf.function(dot_product_attention)):
        for found, value in zip(results(function, inputs), expected, strict=True):
            np.testing.assert_allclose(found, value, atol=tolerance, rtol=tolerance)


def test_the_first_latents_are_shared_by_a_batch_of_any_size() -> None:
    """TensorFlow 2.21 with oneDNN corrupts memory when a matmul broadcasts a batch of one; see attention.py."""
    layer = MultiHeadAttention(1, 8, 8, 8)
    layer.build((1, *_LATENTS.shape[1:]), _DATA.shape)
    gradients_of: dict[int, list[tf.Tensor]] = {}
    for batch in (1, 3, 5):
        data = np.repeat(_DATA[:1], batch, axis=0)
        with tf.GradientTape() as tape:
            outputs = layer(_LATENTS[:1], data)
            loss = tf.reduce_sum(tf.sin(outputs))
        assert outputs.shape == (batch, 5, 8)
        np.testing.assert_allclose(outputs, np.repeat(outputs[:1], batch, axis=0), atol=1e-6)
        gradients_of[batch] = tape.gradient(loss, [v.value for v in layer.trainable_variables])
        for found, value in zip(gradients_of[batch], gradients_of[1], strict=True):
            np.testing.assert_allclose(found / batch, value, atol=1e-5)


def _values_and_gradients(
    function: Callable, layer: keras.layers.Layer, latents: np.ndarray, mask: np.ndarray | None
) -> list[np.ndarray]:
    inputs = [tf.constant(latents), tf.constant(_DATA)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs, attention_mask=None if mask is None else tf.constant(mask))
        loss = tf.reduce_sum(tf.sin(outputs))
    gradients = tape.gradient(loss, [*inputs, *(v.value for v in layer.trainable_variables)])
    return [np.asarray(x) for x in (outputs, *gradients)]


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_row_that_may_attend_nowhere_gets_zeros(chunk_size: int | None) -> None:
    layer = MultiHeadAttention(2, 8, 4, None, chunk_size=chunk_size)
    outputs = layer(_LATENTS, _DATA, attention_mask=np.zeros((2, 13), bool))
    np.testing.assert_array_equal(outputs, np.zeros((2, 5, 4)))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_large_logits_stay_finite_in_half_precision(policy: str) -> None:
    for chunk_size in (None, 4):
        layer = MultiHeadAttention(1, 8, 8, 8, chunk_size=chunk_size, dtype=policy)
        outputs = layer(100 * _LATENTS, 100 * _DATA, attention_mask=_KEY_MASK)
        assert np.isfinite(tf.cast(outputs, "float32")).all()


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_remat_changes_neither_values_nor_gradients(mode: str) -> None:
    results = []
    for remat in (False, True):
        keras.utils.set_random_seed(0)
        block = CrossAttentionBlock(2, remat=remat, dropout=0.5, seed=3)
        after = SelfAttentionBlock(2, remat=remat, dropout=0.5, seed=9)

        def step(latents: tf.Tensor, block: CrossAttentionBlock = block, after: SelfAttentionBlock = after) -> list:
            with tf.GradientTape() as tape:
                x = after(block(latents, _DATA, attention_mask=_KEY_MASK, training=True), training=True)
                loss = tf.reduce_sum(tf.sin(x))
            variables = [v.value for v in block.trainable_variables + after.trainable_variables]
            return [x, *tape.gradient(loss, variables)]

        block.build(_LATENTS.shape, _DATA.shape)
        after.build(_LATENTS.shape)
        call = step if mode == "eager" else tf.function(step)
        results.append(call(tf.constant(_LATENTS)))
    for expected, result in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5, rtol=1e-5)


def test_dropout_follows_its_seed() -> None:
    def run(seed: int) -> np.ndarray:
        keras.utils.set_random_seed(0)
        block = CrossAttentionBlock(2, dropout=0.3, attention_dropout=0.3, seed=seed)
        return np.asarray(block(_LATENTS, _DATA, training=True))

    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: MultiHeadAttention(2, 8, 4, 6, name="layer"), (_LATENTS, _DATA)),
        (lambda: MultiHeadAttention(1, 8, 8, None, "learned", chunk_size=5, seed=1, name="layer"), (_LATENTS, _DATA)),
        (lambda: MLP(3, approximate_gelu=True, name="layer"), (_LATENTS,)),
        (lambda: SelfAttentionBlock(2, 4, 8, widening_factor=2, remat=True, name="layer"), (_LATENTS,)),
        (lambda: CrossAttentionBlock(2, 8, 4, chunk_size=4, name="layer"), (_LATENTS, _DATA)),
        (
            lambda: CrossAttentionBlock(
                v_dim=8, scale="learned", residual="normalised", use_output_projection=False, name="layer"
            ),
            (_LATENTS, _DATA),
        ),
    ],
    ids=["attention", "attention without projection", "mlp", "self", "cross", "cross of the Keras example"],
)
def test_layers(make: Callable, inputs: tuple[np.ndarray, ...], tmp_path: Path) -> None:
    check_layer(make, inputs, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadAttention(3, 8, 9, 4), r"qk_dim = 8 and v_dim = 9: give multiples of num_heads = 3"),
        (lambda: MultiHeadAttention(2, 8, 8, 4, dropout=0.5, chunk_size=4), r"dropout = 0.5: set it to 0, since chunk"),
        (
            lambda: CrossAttentionBlock(attention_dropout=0.5, remat=True),
            r"attention_dropout = 0.5: set it to 0, since",
        ),
    ],
)
def test_settings_that_contradict_each_other(make: Callable[[], keras.layers.Layer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("columns", [1, 12, 14])
def test_a_mask_of_other_columns_than_the_data_has_rows(columns: int, chunk_size: int | None) -> None:
    attention = MultiHeadAttention(2, 8, 8, 4, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=rf"the attention mask is \(2, {columns}\): give one of 13 columns"):
        attention(_LATENTS, _DATA, attention_mask=np.ones((2, columns), bool))
