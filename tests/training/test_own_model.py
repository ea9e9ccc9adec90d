"""A model of one's own: what is refused, its multiply-accumulates, and its optimizer."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import keras
import own_models
import pytest
import tensorflow as tf
from keras import layers
from tiny_perceivers import TINY
from tiny_training import TRAIN

from perceiver import Perceiver, PerceiverConfig
from perceiver.cost import macs_per_image
from pipeline.own_model import own_model_command
from pipeline.training.config import TrainingConfig
from pipeline.training.macs import count_macs, macs_of
from pipeline.training.models import build_model
from pipeline.training.optimization import optimizer
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import OwnModelError

SMALL = OwnModel(own_models.convolutional, image_shape=(8, 8, 1), num_classes=10)


@pytest.mark.parametrize("config", [TINY["conv"], TINY["pixels"]], ids=["conv", "pixels"])
def test_the_counted_macs_are_those_of_the_closed_form(config: PerceiverConfig) -> None:
    model = Perceiver(**asdict(config))
    model.build()
    assert count_macs(model, config.image_shape) == macs_per_image(config) == macs_of(config, model)


def test_the_counted_macs_are_those_counted_by_hand() -> None:
    convolution, depthwise, dense, head = 4 * 4 * 4 * 9, 3 * 3 * 4 * 4, 3 * 3 * 4 * 6, 6 * 10
    assert macs_of(SMALL, build_model(SMALL)) == convolution + depthwise + dense + head
    attending = replace(SMALL, builder=own_models.attending)
    # 8 rows of 8: queries and keys of 2 x 3, values of 2 x 5, logits and weighted sums, the output, the classes
    attention = 8 * 8 * (6 + 6 + 10) + 2 * 8 * 8 * (3 + 5) + 8 * 10 * 8
    assert macs_of(attending, build_model(attending)) == attention + 8 * 10


def macs_of_layer(layer: Callable[[Any], Any], rows: tuple[int, ...] = (8, 8, 3)) -> int | None:
    """Of a layer on images of 8 x 8 x 3, as another shape."""
    images = keras.Input((8, 8, 3))
    return count_macs(keras.Model(images, layer(layers.Reshape(rows)(images))), (8, 8, 3))


@pytest.mark.parametrize(
    ("layer", "rows", "macs"),
    [
        (layers.Conv2D(6, 3, padding="same", groups=3), (8, 8, 3), 64 * 9 * 6),
        (layers.Conv2D(6, 3, padding="same", dilation_rate=2), (8, 8, 3), 64 * 9 * 3 * 6),
        (layers.Conv1D(6, 3, padding="same", groups=3), (64, 3), 64 * 3 * 6),
        (layers.Conv3D(6, 3, padding="same"), (4, 4, 4, 3), 64 * 27 * 3 * 6),
        (layers.Conv2DTranspose(16, 3, padding="same"), (8, 8, 3), 64 * 9 * 3 * 16),
        (layers.Conv2DTranspose(16, 2, strides=2), (8, 8, 3), 256 * 3 * 16),  # each output has one cell
        (layers.Conv1DTranspose(16, 2, strides=2), (64, 3), 128 * 3 * 16),
        (layers.Conv3DTranspose(16, 2, strides=2), (4, 4, 4, 3), 512 * 3 * 16),
        (layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2), (8, 8, 3), 64 * 9 * 3 * 2),
        (layers.SeparableConv1D(6, 3, padding="same"), (64, 3), 64 * 3 * 3 + 64 * 3 * 6),
        (layers.Dense(5), (64, 3), 64 * 3 * 5),
        (layers.EinsumDense("...x,xy->...y", output_shape=16), (8, 8, 3), 64 * 3 * 16),
        (layers.EinsumDense("...x,xy->...y", output_shape=16), (64, 3), 64 * 3 * 16),
        (layers.TimeDistributed(layers.Conv1D(6, 3, padding="same")), (8, 8, 3), 64 * 3 * 3 * 6),
        (layers.LSTM(4, unroll=True), (64, 3), 64 * (3 * 16 + 4 * 16)),
    ],
)
def test_the_macs_of_a_layer(layer: Callable[[Any], Any], rows: tuple[int, ...], macs: int) -> None:
    assert macs_of_layer(layer, rows) == macs


def of_tensorflow(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return layers.Lambda(function, output_shape=(8, 8, 3))


def test_macs_of_operations_of_tensorflow() -> None:
    kernel, several = tf.ones((3, 3)), tf.ones((8, 1, 3, 3))
    assert macs_of_layer(of_tensorflow(tf.function(lambda x: tf.function(tf.matmul)(x, kernel)))) == 64 * 3 * 3
    # The dimensions of an ellipsis are broadcast.
    assert macs_of_layer(of_tensorflow(lambda x: tf.einsum("...wc,...cd->...wd", x, several[:, 0]))) == 64 * 3 * 3
    assert macs_of_layer(of_tensorflow(lambda x: tf.einsum("...hwc->...whc", x))) == 0
    assert macs_of_layer(of_tensorflow(lambda x: tf.map_fn(lambda row: row + 1, x))) == 0


@pytest.mark.parametrize(
    "layer",
    [
        keras.Sequential([layers.Reshape((64, 3)), layers.LSTM(4)]),
        of_tensorflow(lambda x: tf.map_fn(lambda row: tf.matmul(row, tf.ones((8, 3, 3))), x)),
        of_tensorflow(lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: tf.matmul(x, tf.ones((1, 8, 3, 3))), lambda: x)),
        of_tensorflow(lambda x: tf.matmul(tf.boolean_mask(x, x[..., 0] > 0), tf.ones((3, 3)))),
        of_tensorflow(lambda x: tf.sparse.sparse_dense_matmul(tf.sparse.from_dense(x[0, 0]), tf.ones((3, 3)))),
        of_tensorflow(lambda x: tf.numpy_function(lambda y: y, [x], tf.float32)),
    ],
    ids=["recurrent", "loop", "condition", "shape", "sparse", "python"],
)
def test_macs_that_the_graph_does_not_tell_are_unknown_and_not_too_low(layer: Callable[[Any], Any]) -> None:
    assert macs_of_layer(layer) is None


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (own_models.with_too_few_logits, r"gives \(None, 9\): it should give logits \(None, 10\)"),
        (own_models.with_a_softmax, "gives probabilities, which sum to 1: leave its softmax out"),
        (own_models.with_a_sigmoid, "ends in a sigmoid, which keeps its outputs between 0 and 1: leave it out"),
        (own_models.within_a_function, "ends in a tanh, which keeps its outputs between -1 and 1: leave it out"),
        (own_models.no_model, "the builder no_model returns str: return a keras.Model"),
        (own_models.failing, "the builder failing failed: RuntimeError: no such layer"),
    ],
)
def test_what_is_no_classifier_is_refused(builder: Callable[..., Any], message: str) -> None:
    with pytest.raises(OwnModelError, match=message):
        build_model(replace(SMALL, builder=builder))
    other_images = replace(SMALL, builder=lambda **_: own_models.convolutional((9, 9, 1), 10, (), ()))
    with pytest.raises(OwnModelError, match=r"does not take uint8 images \(8, 8, 1\)"):
        build_model(other_images)


@pytest.mark.parametrize(
    ("builder", "error"),
    [
        (own_models.with_a_function, "NotImplementedError: .*Activated"),
        (own_models.with_settings, "NotImplementedError: .*Sized"),
        (own_models.with_a_bad_config, "RuntimeError: no config"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_epoch(builder: Callable[..., Any], error: str) -> None:
    """It failed after the last one, and with a `get_config` in the file all of them are trained again."""
    with pytest.raises(
        OwnModelError, match=f"{builder.__name__} cannot be saved: {error}.*: give the class of the lay"
    ):
        build_model(replace(SMALL, builder=builder))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_softmax_is_found_in_16_bits_too(policy: str) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        with pytest.raises(OwnModelError, match="gives probabilities"):
            build_model(replace(SMALL, builder=own_models.with_a_softmax))
        build_model(SMALL)
    finally:
        keras.config.set_dtype_policy(before)


def test_muon_leaves_the_last_kernel_to_adamw() -> None:
    model = build_model(SMALL)
    config = TrainingConfig(**TRAIN | {"optimizer": "muon"})
    made = optimizer(config, model, steps_per_epoch=10)
    made.build(model.trainable_variables)
    by_muon = [v.path for v, adam in zip(model.trainable_variables, made.adam_velocities, strict=True) if adam is None]
    assert by_muon == ["convolution/kernel", "depthwise/kernel", "dense/kernel"]


@pytest.mark.parametrize("option", ["--dry-run", "--until train", "--force train", "--summary-json out.json"])
def test_what_the_command_does_not_know_of_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They would train a model where none was wanted."""
    assert own_model_command(OwnModel(no_model), ["quickstart", *option.split()]) == 2
    assert f"{option.split()[0]} is for pipeline/run.py alone: leave it out" in " ".join(
        capsys.readouterr().err.split()
    )


def test_options_of_the_perceiver_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model.num-latents=4", "--tracking.experiment", "mine", "--train.epochs", "2", "--until", "train"]
    assert own_model_command(OwnModel(no_model), ["quickstart", *given]) == 2  # by the last one, so that nothing starts
    said = "warning: a model of one's own does not use --model.num-latents, --tracking.experiment: leave it out"
    assert said in capsys.readouterr().err.splitlines()


def no_model(**_: Any) -> Any:
    raise AssertionError
