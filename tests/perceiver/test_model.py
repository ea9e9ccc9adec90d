"""The model: files, precisions, execution modes, gradients, attention maps; NumPy reference; published example."""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy_perceiver as reference
import pytest
import tensorflow as tf
from published_example import PublishedPerceiver
from tiny_perceivers import BASE, TINY

from perceiver import Perceiver, PerceiverConfig, attention_maps

ALL = pytest.mark.parametrize("config", TINY.values(), ids=TINY)


def build(config: PerceiverConfig, **kwargs: Any) -> Perceiver:
    """A model with random weights, including biases and LayerNorms."""
    model = Perceiver(**asdict(config), name="model", **kwargs)
    model.build()
    random = np.random.default_rng(1)
    model.set_weights([random.normal(size=w.shape, scale=0.3) for w in model.weights])
    return model


def images_of(config: PerceiverConfig, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, *config.image_shape)).astype("uint8")


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)


@ALL
def test_config_round_trip(config: PerceiverConfig) -> None:
    model = Perceiver(**asdict(config), name="model")
    assert model.get_config().keys() == {"name", "trainable", "dtype", *(field.name for field in fields(config))}
    copy = Perceiver.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    assert copy.config == config


@ALL
def test_file_round_trip(config: PerceiverConfig, tmp_path: Path) -> None:
    model = build(config)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert loaded.config == config
    np.testing.assert_array_equal(loaded(images_of(config)), model(images_of(config)))


@pytest.mark.long
def test_learns_and_continues_from_its_file(tmp_path: Path) -> None:
    """Overfits eight images in 60 steps; the published example's printed run stayed at chance."""
    images, labels = images_of(BASE, 8), np.arange(8) % 5
    model = Perceiver(**asdict(replace(BASE, num_iterations=1)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=1e-4), loss)
    model.fit(images, labels, batch_size=8, epochs=60, verbose=0)
    assert (np.argmax(model(images), axis=-1) == labels).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded(images), model(images))
    assert int(loaded.optimizer.iterations) == 60
    assert np.isclose(loaded.train_on_batch(images, labels), model.train_on_batch(images, labels))


@ALL
def test_gradients_reach_every_weight(config: PerceiverConfig) -> None:
    model = build(config)
    assert all(layer.trainable for layer in model._flatten_layers())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(model(images_of(config), training=True)))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        assert gradient is not None, variable.path
        if not variable.path.endswith("key/bias"):  # it adds the same number to all logits of a softmax
            assert np.any(np.asarray(tf.convert_to_tensor(gradient)) != 0), variable.path


@ALL
def test_graph_computes_the_same(config: PerceiverConfig) -> None:
    model = build(config)
    expected = model(images_of(config))
    assert expected.shape == (3, config.num_classes)
    np.testing.assert_allclose(tf.function(model)(images_of(config)), expected, atol=1e-5)
    inputs = keras.Input(config.image_shape, dtype="uint8")
    functional = keras.Model(inputs, model(inputs))
    assert functional.output.shape == (None, config.num_classes)
    np.testing.assert_allclose(functional(images_of(config)), expected, atol=1e-5)


@pytest.mark.long
def test_xla_computes_the_same_gradients() -> None:
    model, images = build(TINY["frugal"]), tf.constant(images_of(BASE))

    def step(images: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_sum(tf.sin(logits))
        return [logits, *tape.gradient(loss, [v.value for v in model.trainable_variables])]

    results = [tf.function(step, jit_compile=jit_compile)(images) for jit_compile in (False, True)]
    for plain, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "policy"), [*((name, "mixed_bfloat16") for name in TINY), ("patches", "mixed_float16")]
)
def test_mixed_precision(name: str, policy: str) -> None:
    config = TINY[name]
    full, mixed = build(config), build(config, dtype=policy)
    assert {w.dtype for w in mixed.weights} == {"float32"}
    assert mixed.data_array(images_of(config)).dtype == mixed.compute_dtype
    logits = mixed(images_of(config))
    assert logits.dtype == "float32"
    np.testing.assert_allclose(logits, full(images_of(config)), atol=0.15)


@pytest.mark.long
def test_fits_with_loss_scaling_and_xla() -> None:
    config = replace(TINY["conv"], num_iterations=1, dropout=0.1, attention_dropout=0.1)
    images, labels = images_of(config, 8), np.arange(8) % 5
    model = Perceiver(**asdict(config), dtype="mixed_float16")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-2), loss, jit_compile=True)
    losses = model.fit(images, labels, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"share_first_cross_attention": True},
        {},
        {"share_first_latent_transformer": False},
        {"share_weights": False},
        {"num_iterations": 1, "num_self_attention_repeats": 3},
    ],
    ids=str,
)
def test_repeated_cross_attends_equal_numpy(changes: dict[str, Any]) -> None:
    changes = {"num_iterations": 3, "num_self_attention_blocks": 2, "num_cross_attention_heads": 2, **changes}
    config = replace(BASE, **changes)
    model = build(config)
    weights = {w.path: w.numpy().astype("float64") for w in model.weights}
    images = images_of(config)
    iterations = config.num_iterations
    if not config.share_weights:
        order = [(i, i) for i in range(iterations)]
    else:
        order = [
            (
                0 if config.share_first_cross_attention else int(i > 0),
                0 if config.share_first_latent_transformer else int(i > 0),
            )
            for i in range(iterations)
        ]
    mask = np.random.default_rng(2).random((3, config.num_inputs)) < 0.7
    logits = model(images, attention_mask=mask)
    for image, image_mask, image_logits in zip(images, mask, logits, strict=True):
        x = image / 127.5 - 1
        patches = [x[i : i + 2, j : j + 2].reshape(-1) for i in range(0, 8, 2) for j in range(0, 8, 2)]
        data = (
            reference.linear(weights, "model/stem/projection", np.stack(patches)) + weights["model/positions/positions"]
        )
        latents = weights["model/latents"]
        for cross, transformer in order:
            full_mask = np.broadcast_to(image_mask, (config.num_latents, config.num_inputs))
            latents, _ = reference.cross_attend(weights, f"model/cross_attend_{cross}", latents, data, 2, full_mask)
            for _ in range(config.num_self_attention_repeats):
                for block in range(2):
                    latents = reference.self_attend(weights, f"model/self_attend_{transformer}_{block}", latents, 2)
        expected = reference.linear(weights, "model/logits", latents.mean(axis=0))
        np.testing.assert_allclose(image_logits, expected, atol=1e-5)


def test_chunks_and_remat_change_nothing() -> None:
    plain = build(replace(TINY["frugal"], attention_chunk_size=None, remat=False))
    frugal = build(TINY["frugal"])
    np.testing.assert_allclose(frugal(images_of(BASE)), plain(images_of(BASE)), atol=1e-5)


def test_attention_maps() -> None:
    config = replace(TINY["pixels"], num_iterations=3, num_cross_attention_heads=3)
    model = build(config)
    maps = attention_maps(model, images_of(config))
    assert maps.shape == (3, 3, 3, config.num_latents, 6, 4)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(axis=(-2, -1)), 1, atol=1e-5)
    data = model.data_array(images_of(config))
    first = model.cross_attends[0](model.latents[None], data, return_weights=True)[1]
    np.testing.assert_allclose(maps[0], np.reshape(first, maps[0].shape), atol=1e-6)
    chunked = build(replace(config, attention_chunk_size=5))
    np.testing.assert_allclose(attention_maps(chunked, images_of(config)), maps, atol=1e-5)


def test_masked_inputs_do_not_matter() -> None:
    model = build(BASE)
    images = images_of(BASE)
    changed = images.copy()
    changed[:, :2, :2] = 0  # the first patch
    mask = np.ones((3, BASE.num_inputs), bool)
    mask[:, 0] = False
    assert not np.allclose(model(changed), model(images))
    np.testing.assert_allclose(model(changed, attention_mask=mask), model(images, attention_mask=mask), atol=1e-6)


def test_latents_have_an_identity_path() -> None:
    """If attention and MLPs output zero, latents pass unchanged, unlike in the published example."""

    def latents_after(config: PerceiverConfig) -> tuple[np.ndarray, np.ndarray]:
        model = build(config)
        for weight in model.weights:
            if "/output_projection/" in weight.path or "/value/" in weight.path:
                weight.assign(np.zeros(weight.shape))
        latents, _ = model.encode(model.data_array(images_of(config)))
        return np.asarray(latents), np.broadcast_to(model.latents.numpy(), latents.shape)

    np.testing.assert_array_equal(*latents_after(BASE))
    assert not np.allclose(*latents_after(TINY["published"]))


def test_training_differs_from_inference_by_dropout_alone() -> None:
    """The published example augments inside `call`, at inference too."""
    for config in TINY.values():
        model = build(config)
        np.testing.assert_allclose(model(images_of(config), training=True), model(images_of(config)), atol=1e-6)
    model = build(replace(BASE, dropout=0.5, seed=3))
    assert not np.allclose(model(images_of(BASE), training=True), model(images_of(BASE)))


def test_dropout_follows_its_seed() -> None:
    def run(seed: int) -> np.ndarray:
        model = build(replace(BASE, dropout=0.5, attention_dropout=0.3, seed=seed))
        return np.asarray(model(images_of(BASE), training=True))

    np.testing.assert_array_equal(run(3), run(3))
    assert not np.allclose(run(3), run(4))


def test_zero_initialised_logits() -> None:
    model = Perceiver(**asdict(replace(BASE, zero_init_logits=True)))
    np.testing.assert_array_equal(model(images_of(BASE)), np.zeros((3, 5)))


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 16, 3), (9, 9, 3), (1, 1, 3)])
def test_images_of_another_shape(shape: tuple[int, int, int], is_built: bool) -> None:
    """A built model, as one that was loaded, would broadcast channels and positions, or cut edges."""
    model = Perceiver(**asdict(BASE))
    if is_built:
        model.build((None, 8, 8, 3))
    message = rf"the images are {re.escape(str(shape))}, model.image_shape is \(8, 8, 3\): make them equal"
    with pytest.raises(ValueError, match=message):
        model(np.zeros((1, *shape), "uint8"))
    with pytest.raises(ValueError, match=message):
        attention_maps(model if is_built else build(BASE), np.zeros((1, *shape), "uint8"))


def test_config_of_the_published_example_equals_it() -> None:
    """Same output, same gradients, same number of weights, on images resized to twice their size."""
    config = replace(
        TINY["published"],
        num_self_attention_blocks=2,
        self_attention_qk_dim=24,
        latent_dim=12,
        head_hidden_dim=12,
        layer_norm_epsilon=1e-6,
        dropout_after_attention=False,
    )
    ours = build(config)
    example = PublishedPerceiver(2, 64, 4, 12, 2, 2, [12, 12], 0.2, 2, [12, 5])
    images = images_of(config)
    resized = keras.layers.Resizing(16, 16)(images / np.float32(127.5) - 1)
    example(resized)
    assert example.count_params() == ours.count_params()
    matrices = [[w for w in model.weights if len(w.shape)] for model in (ours, example)]
    # The example passes its keys to keras.layers.Attention as values and its values as keys.
    paths = [w.path for w in matrices[0]]
    key, value = (paths.index(f"model/cross_attend_0/attention/{name}/kernel") for name in ("key", "value"))
    matrices[0][key : key + 2], matrices[0][value : value + 2] = (
        matrices[0][value : value + 2],
        matrices[0][key : key + 2],
    )
    for ours_w, example_w in zip(*matrices, strict=True):
        example_w.assign(np.reshape(ours_w, example_w.shape))
    (factor,), (scale,) = ([w for w in model.weights if not len(w.shape)] for model in (ours, example))
    scale.assign(factor)

    def step(model: keras.Model, images: tf.Tensor, weights: list[keras.Variable]) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = model(images)
            loss = tf.reduce_sum(tf.sin(logits))
        gradients = tape.gradient(loss, [w.value for w in weights])
        return [logits, *map(tf.convert_to_tensor, gradients)]

    expected = step(example, resized, [scale, *matrices[1]])
    results = step(ours, images, [factor, *matrices[0]])
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.reshape(result, value.shape), value, atol=2e-5, rtol=1e-3)
