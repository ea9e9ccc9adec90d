"""`keras.applications`, and other models that amplify rounding"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import CLASSES, CROSSENTROPY, DIFFERS, Result, Worker, X, Y, case, fitted

from pipeline.multiworker.first_step import FirstStep
from pipeline.multiworker.keras_internals import replaced

PICTURES = np.random.default_rng(7).uniform(size=(18, 32, 32, 3)).astype(np.float32) * 255
LABELS = CLASSES[:18]
SYNCHRONIZED = {"batch_norm": "synchronize"}


def resnet() -> keras.Model:
    return keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=2)


def fine_tuned() -> keras.Model:
    base = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), include_top=False, pooling="avg")
    return keras.Sequential([keras.layers.Input((32, 32, 3)), base, keras.layers.Dense(2, "softmax")])


def of_pictures(worker: Worker, make: Callable[[], keras.Model], enable: dict[str, Any], **arguments: Any) -> Result:
    model = worker.compiled(make, CROSSENTROPY, lambda: keras.optimizers.SGD(1e-3), enable)
    return fitted(model, PICTURES, LABELS, batch_size=9, **arguments)


@case('batch_norm="synchronize"')
def resnet_without_the_remedy(worker: Worker) -> Result:
    """ResNet50 from scratch without `batch_norm="synchronize"`"""
    return of_pictures(worker, resnet, {})


@case()
def resnet_in_float64(worker: Worker) -> Result:
    """ResNet50 from scratch with `batch_norm="synchronize"`, in float64"""
    keras.config.set_floatx("float64")
    return of_pictures(worker, resnet, SYNCHRONIZED)


@case()
def mobilenet_in_float64(worker: Worker) -> Result:
    """MobileNetV2, first frozen, then fine-tuned with `batch_norm="synchronize"`, in float64"""
    keras.config.set_floatx("float64")
    model = worker.compiled(fine_tuned, CROSSENTROPY, lambda: keras.optimizers.SGD(1e-3))
    base = model.layers[0]
    base.trainable = False
    model.compile(keras.optimizers.SGD(1e-3), CROSSENTROPY)
    frozen = fitted(model, PICTURES, LABELS, batch_size=9)
    base.trainable = True
    model.compile(keras.optimizers.SGD(1e-3), CROSSENTROPY)
    worker.enable(model, **SYNCHRONIZED)
    tuned = fitted(model, PICTURES, LABELS, batch_size=9)
    return tuned | {f"frozen {name}": value for name, value in frozen.items()}


def accepted(worker: Worker, way: str, train: Callable[[], Any]) -> Result:
    """Trains where the check finds a difference first and then, computing in the given way, that it is rounding."""
    ways: list[str] = []
    compute = FirstStep._alone

    def noting(check: FirstStep, rows: Any, **how: Any) -> Any:
        ways.extend(how)
        return compute(check, rows, **how)

    with replaced(FirstStep, "_alone", noting):
        train()
    assert worker.num_workers == 1 or (ways and ways[-1] == way), ways
    return {"accepted": True}


@case(learns=False)
def resnet_in_float32(worker: Worker) -> Result:
    """ResNet50 with `batch_norm="synchronize"` in float32: not refused, though rounding moves its gradients"""
    return accepted(worker, "float64", lambda: of_pictures(worker, resnet, SYNCHRONIZED, epochs=1, steps_per_epoch=1))


class Chaos(keras.layers.Layer):
    """The logistic map, which doubles a difference at each turn."""

    def call(self, x: Any) -> Any:
        x = keras.ops.sigmoid(x)
        for _ in range(16):
            x = 4 * x * (1 - x)
        return x


def chaotic() -> keras.Model:
    layers = keras.layers
    inputs = layers.Input((4,))
    x = layers.BatchNormalization(synchronized=True)(layers.Dense(8)(inputs))
    return keras.Model(inputs, layers.Dense(2, "softmax")(Chaos()(x)))


class OfFloat32(keras.Model):
    """A model with a step that cannot be computed in float64."""

    total: Any = staticmethod(tf.reduce_mean)

    def train_step(self, data: Any) -> Any:
        x, y = data
        x = tf.cast(x, tf.float32)
        with tf.GradientTape() as tape:
            error = tf.one_hot(y, 2, dtype=tf.float32) - self(x, training=True)
            loss = self.total(tf.square(error))
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_weights), self.trainable_weights, strict=True)
        )
        return {"loss": loss}


class SumOfFloat32(OfFloat32):
    total = staticmethod(tf.reduce_sum)


def chaotic_of(kind: type[OfFloat32]) -> keras.Model:
    inner = chaotic()
    return kind(inner.inputs, inner.outputs)


@case(learns=False)
def rounding_that_is_amplified(worker: Worker) -> Result:
    """a layer that amplifies rounding: compared in float64"""
    return accepted(worker, "float64", lambda: fitted(worker.compiled(chaotic, CROSSENTROPY), X, Y))


@case(learns=False)
def rounding_that_is_amplified_in_a_step_of_float32(worker: Worker) -> Result:
    """the same in a `train_step` that is bound to float32: compared with what rounding changes"""
    return accepted(worker, "trial", lambda: fitted(worker.compiled(lambda: chaotic_of(OfFloat32)), X, Y))


@case(DIFFERS)
def sum_in_a_step_of_float32(worker: Worker) -> Result:
    """the same `train_step` with a sum over the batch"""
    return fitted(worker.compiled(lambda: chaotic_of(SumOfFloat32)), X, Y)


@case(DIFFERS)
def sum_beside_amplified_rounding(worker: Worker) -> Result:
    """a layer that amplifies rounding, and a loss that is a sum over the batch"""
    loss = lambda y, p: keras.ops.sum(keras.losses.sparse_categorical_crossentropy(y, p))  # noqa: E731
    return fitted(worker.compiled(chaotic, loss), X, Y)
