"""The private names of Keras that pipeline/multiworker relies on, and what it does in one process."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import multiworker
from pipeline.multiworker.iterators import BackgroundReleased


def classifier() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)).astype("float32"), rng.integers(0, 2, 40)


def test_keras_has_the_private_names_that_are_relied_on() -> None:
    multiworker.check_keras()


def test_layers_that_are_made_afterwards_get_the_same_initial_weights() -> None:
    def weights() -> np.ndarray:
        layer = keras.layers.Dense(4)
        layer.build((None, 3))
        return layer.get_weights()[0]

    keras.utils.set_random_seed(5)
    before = weights()
    keras.utils.set_random_seed(5)
    multiworker.check_keras()
    np.testing.assert_array_equal(weights(), before)


# Another version of Keras cannot be installed beside this one, so the test changes the classes of this one.
@pytest.mark.parametrize("name", sorted(multiworker.PRIVATE_NAMES))
def test_a_keras_without_a_private_method_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, _ = multiworker.PRIVATE_NAMES[name]
    model = classifier()
    monkeypatch.setattr(owner, name, lambda self, something_else: None)
    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has {owner.__name__}.{name}.*something_else"):
        multiworker.enable(model)


@pytest.mark.parametrize("kind", sorted(multiworker.PRIVATE_ATTRIBUTES))
def test_a_keras_without_a_private_attribute_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(multiworker.PRIVATE_ATTRIBUTES, kind, ("_of_another_keras",))
    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has no {kind}._of_another_keras"):
        multiworker.check_keras()


def test_one_process_trains_the_same_with_and_without() -> None:
    def losses(enabled: bool) -> dict[str, list[float]]:
        model, (x, y) = classifier(), rows()
        if enabled:
            multiworker.enable(model, multiworker.StopSignal())
        return model.fit(x, y, batch_size=16, epochs=3, validation_data=(x, y), verbose=0).history

    enabled, stock = losses(True), losses(False)
    assert enabled.keys() == stock.keys()
    for name, values in stock.items():
        np.testing.assert_allclose(enabled[name], values, atol=1e-6, err_msg=name)


def test_each_validation_takes_the_first_batches_of_endless_data() -> None:
    def losses(enabled: bool) -> list[float]:
        model, data = classifier(), tf.data.Dataset.from_tensor_slices(rows()).batch(16).repeat()
        if enabled:
            multiworker.enable(model)
        history = model.fit(
            data, steps_per_epoch=2, epochs=3, validation_data=data, validation_steps=2, shuffle=False, verbose=0
        )
        return list(history.history["val_loss"])

    np.testing.assert_allclose(losses(enabled=True), losses(enabled=False), atol=1e-6)


class _Validations(keras.callbacks.Callback):
    """Keeps the iterators of the validations and their losses, and ends the first one after a batch."""

    def __init__(self, *, ends_the_first: bool) -> None:
        super().__init__()
        self.ends_the_first = ends_the_first
        self.iterators: list[object] = []
        self.losses: list[float] = []

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        # A private name of Keras: without it `iterator_of_validations` finds nothing, and each validation is slow.
        self.iterators.append(self.model._eval_epoch_iterator._current_iterator)
        self.model.stop_evaluating = self.ends_the_first and not self.losses

    def on_test_end(self, logs: Any = None) -> None:
        self.losses.append(logs["loss"])


@pytest.mark.parametrize("ends_the_first", [False, True])
def test_validations_on_endless_data_share_an_iterator_unless_one_is_cut_short(ends_the_first: bool) -> None:
    model, data = classifier(), tf.data.Dataset.from_tensor_slices(rows()).batch(16).repeat()
    model.optimizer.learning_rate = 0.0  # so that only the batches decide about the losses
    multiworker.enable(model)
    seen = _Validations(ends_the_first=ends_the_first)
    settings = {"steps_per_epoch": 1, "validation_steps": 2, "shuffle": False, "verbose": 0}
    model.fit(data, epochs=3, validation_data=data, callbacks=[seen], **settings)
    assert len({id(iterator) for iterator in seen.iterators}) == 1 + ends_the_first
    assert seen.losses[1] == seen.losses[2] == model.evaluate(data, steps=2, verbose=0)[0]
    assert (seen.losses[0] == seen.losses[1]) != ends_the_first


def test_a_stop_is_agreed_on_in_a_step_and_not_before() -> None:
    model, (x, y), stop = classifier(), rows(), multiworker.StopSignal()
    multiworker.enable(model, stop)
    model.train_on_batch(x, y)
    assert not stop.agreed
    stop.request()
    assert not stop.agreed
    model.train_on_batch(x, y)
    assert stop.agreed


def test_enabling_again_after_another_compile_trains_with_the_new_settings() -> None:
    model, (x, y) = classifier(), rows()
    multiworker.enable(model)
    model.fit(x, y, verbose=0)
    before = model.get_weights()
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(0.0), loss, metrics=[loss])
    multiworker.enable(model)
    history = model.fit(x, y, verbose=0).history
    assert set(history) == {"loss", loss}
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_iterator_is_released_in_a_thread_of_its_own() -> None:
    let_go, released = threading.Event(), threading.Event()

    class Batches:
        def __iter__(self) -> Iterator[int]:
            try:
                yield 1
                yield 2
            finally:  # runs when the iterator is released
                assert let_go.wait(10)
                released.set()

    iterator = BackgroundReleased(Batches())
    assert next(iterator) == 1
    del iterator
    assert not released.is_set()
    let_go.set()
    assert released.wait(10)


def test_an_enabled_model_is_saved_as_what_it_was(tmp_path: Path) -> None:
    model, (x, _) = classifier(), rows()
    multiworker.enable(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_strategy_of_one_process_needs_no_seed() -> None:
    x, y = rows()

    def losses(strategy: tf.distribute.Strategy) -> list[float]:
        with strategy.scope():
            model = classifier()
        multiworker.enable(model)
        tf.random.set_seed(None)
        losses: list[float] = model.fit(x, y, batch_size=len(x), epochs=3, verbose=0).history["loss"]
        return losses

    mirrored, plain = losses(tf.distribute.MirroredStrategy()), losses(tf.distribute.get_strategy())
    np.testing.assert_allclose(mirrored, plain, atol=1e-6)
    assert plain[-1] < plain[0]


def test_workers_are_not_looked_for_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["192.0.2.1:2222", "[2001:db8::1]:2222"]}}))
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    multiworker.bypass_proxies()
    assert os.environ["no_proxy"] == "192.0.2.1,2001:db8::1"
    assert "no_grpc_proxy" not in os.environ
    os.environ["no_proxy"] = "a,192.0.2.1"
    multiworker.bypass_proxies()
    assert os.environ["no_proxy"] == "a,192.0.2.1,2001:db8::1"


class NotForXla(keras.optimizers.SGD):
    """An optimizer that calls Python, which XLA cannot."""

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        super().update_step(tf.py_function(tf.identity, [gradient], gradient.dtype), variable, learning_rate)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_xla_compiles_the_update_too(jit_compile: bool) -> None:
    model = classifier()
    model.compile(NotForXla(), "sparse_categorical_crossentropy", jit_compile=jit_compile)
    multiworker.enable(model)
    if not jit_compile:
        model.fit(*rows(), verbose=0)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="EagerPyFunc"):
        model.fit(*rows(), verbose=0)


class WithATermOfTraining(keras.Model):
    """A model whose loss has a term in training alone."""

    def compute_loss(self, *args: Any, training: bool = False, **kwargs: Any) -> tf.Tensor:
        return super().compute_loss(*args, training=training, **kwargs) + (1.0 if training else 0.0)


def test_a_step_that_xla_compiles_has_the_metrics_and_the_loss_of_keras() -> None:
    words = np.random.default_rng(0).integers(1, 9, (40, 6))
    words[:, 2:] *= np.arange(40)[:, None] % 5 == 0  # most of the words are padding

    def history(enabled: bool) -> dict[str, list[float]]:
        keras.utils.set_random_seed(0)
        x = keras.Input((6,), dtype="int32")
        hidden = keras.layers.Embedding(9, 4, mask_zero=True)(x)
        outputs = {name: keras.layers.Dense(3, "softmax", name=name)(hidden) for name in ("a", "b")}
        model = WithATermOfTraining(x, outputs)
        loss = "sparse_categorical_crossentropy"
        metrics = {"a": "accuracy", "b": "accuracy"}
        model.compile("sgd", {"a": loss, "b": loss}, metrics=metrics, jit_compile=True)
        if enabled:
            multiworker.enable(model)
        y = {"a": words % 3, "b": words % 2}
        return model.fit(words, y, batch_size=16, epochs=2, validation_data=(words, y), verbose=0).history

    enabled, stock = history(True), history(False)
    assert enabled.keys() == stock.keys()
    for name, values in stock.items():
        np.testing.assert_allclose(enabled[name], values, atol=1e-5, err_msg=name)
