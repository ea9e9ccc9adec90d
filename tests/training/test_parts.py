"""A batch that is computed in parts by TensorFlow's threads: the same as a whole one, and only where it may be."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_training import MODEL

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.data.rows import Rows
from pipeline.training import fit
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel
from pipeline.training.parts import MOST_PARTS, compute_in_parts, num_parts
from pipeline.training.worker import Worker
from pipeline.workers import in_process

CONFIG = PerceiverConfig(**MODEL)
OWN = OwnModel(keras.Sequential, image_shape=(8, 8, 1), num_classes=10)


def images(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 8, 8, 1), dtype=np.uint8)


def models(parts: int, **shape: Any) -> tuple[Perceiver, Perceiver]:
    """A model, and one with the same weights that computes in parts."""
    both = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = Perceiver(**asdict(PerceiverConfig(**MODEL | {"num_iterations": 1} | shape)))
        model.build()
        both.append(model)
    compute_in_parts(both[1], parts)
    return both[0], both[1]


def loss_and_gradients(model: Perceiver, rows: int, known: bool) -> list[tf.Tensor]:
    @tf.function(input_signature=[tf.TensorSpec((rows if known else None, 8, 8, 1), tf.uint8)], autograph=False)
    def step(batch: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(batch, training=True) - 1.0))
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    return step(images(rows))


CONVOLUTIONS = {"stem": "conv", "conv_channels": 4, "cross_attention_prior": True}


@pytest.mark.parametrize(
    ("rows", "known", "shape"),
    [
        (7, True, CONVOLUTIONS),
        (7, False, CONVOLUTIONS),
        (1, True, CONVOLUTIONS),
        # Fewer rows than parts, and their number is not known when the step is traced: some parts have none.
        (1, False, CONVOLUTIONS),
        (2, False, {"remat": True, "attention_chunk_size": 4}),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_batch(rows: int, known: bool, shape: dict[str, Any]) -> None:
    whole, divided = models(3, **shape)
    for expected, found in zip(
        loss_and_gradients(whole, rows, known), loss_and_gradients(divided, rows, known), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=5e-5)


def test_parts_draw_different_numbers_in_dropout() -> None:
    _, divided = models(2, logits_dropout=0.5)
    logits = divided(np.repeat(images(1), 16, axis=0), training=True).numpy()
    assert not np.array_equal(logits[:8] == 0, logits[8:] == 0)
    assert np.ptp(divided(np.repeat(images(1), 16, axis=0), training=False), axis=0).max() < 1e-6


@pytest.mark.parametrize(
    ("cpus", "model", "settings", "parts"),
    [
        (1.0, CONFIG, {}, 1),
        (0.25, CONFIG, {}, 1),
        (2.75, CONFIG, {}, 2),
        (float(MOST_PARTS), CONFIG, {}, MOST_PARTS),
        (MOST_PARTS + 1.0, CONFIG, {}, 1),
        (2.0, CONFIG, {"use_gpu": True}, 1),
        (2.0, CONFIG, {"jit_compile": True}, 1),
        (2.0, OWN, {}, 1),
    ],
)
def test_where_a_batch_is_divided(cpus: float, model: Any, settings: dict[str, Any], parts: int) -> None:
    assert num_parts(model, TrainingConfig(cpus_per_worker=cpus, **settings)) == parts


def test_a_worker_with_several_cpus_trains_in_parts_with_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int | None] = []
    told: list[tuple[Any, Any]] = []
    peaks: list[int] = []
    data_array = Perceiver.data_array

    def noted(model: Perceiver, batch: tf.Tensor) -> tf.Tensor:
        computed.append(batch.shape[0])
        return data_array(model, batch)

    def peak(dtype: str, products: int) -> float:
        peaks.append(products)
        return 1e9

    # TensorFlow may run in this process already, and takes no settings then.
    monkeypatch.setattr(in_process, "set_up_tensorflow", lambda *given, **named: told.append((given, named)))
    monkeypatch.setattr(fit, "matmul_peak", peak)
    monkeypatch.setattr(Perceiver, "data_array", noted)
    rows = Rows(np.arange(16), images(16), np.arange(16, dtype=np.int32) % 10)
    reports: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        reports.append(metrics)

    config = TrainingConfig(num_workers=1, cpus_per_worker=3, epochs=1, global_batch_size=8)
    in_process.train_in_process(CONFIG, config, rows, rows, Worker(report=report))
    assert told == [((3, False), {"divides_operations": False})]
    assert peaks == [3], "the peak is that of three products at a time"
    assert {2, 3} <= set(computed) <= {None, 2, 3}, "8 rows are 2, 3 and 3; the validation's number is not known"
    assert reports[0]["val_loss"] > 0
