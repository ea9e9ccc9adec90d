"""The private names of Keras that pipeline/multiworker.py relies on, and that it mends what it says."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src.backend.tensorflow import trainer as keras_trainer

from pipeline import multiworker


def test_keras_has_the_private_names_that_are_overridden() -> None:
    multiworker.check_keras()


@pytest.mark.parametrize("name", sorted(multiworker.PRIVATE_NAMES))
def test_a_keras_without_a_private_name_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Another Keras cannot be installed beside this one, so its trainer is made to look like another.
    monkeypatch.setattr(keras_trainer.TensorFlowTrainer, name, lambda self, something_else: None, raising=False)
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has {name}.*something_else"):
        multiworker.enable(model)


def test_a_keras_that_reduces_logs_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(keras_trainer, "reduce_per_replica")
    with pytest.raises(RuntimeError, match="reduce_per_replica"):
        multiworker.check_keras()


def test_one_process_trains_the_same_with_and_without() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)).astype("float32"), rng.integers(0, 2, 40)

    def losses(enabled: bool) -> list[float]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, activation="softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
        if enabled:
            multiworker.enable(model, multiworker.StopSignal())
        history = model.fit(x, y, batch_size=16, epochs=3, validation_data=(x, y), shuffle=False, verbose=0).history
        return [float(np.squeeze(value)) for name in sorted(history) for value in history[name]]

    assert losses(enabled=True) == pytest.approx(losses(enabled=False), abs=1e-7)


def test_a_stop_is_agreed_on_in_a_step_and_not_before() -> None:
    stop = multiworker.StopSignal()
    stop.request()
    assert not stop.agreed
    stop.exchange()
    assert stop.agreed


def test_an_enabled_model_is_saved_as_what_it_was(tmp_path: Path) -> None:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    multiworker.enable(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    x = np.ones((4, 3), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
