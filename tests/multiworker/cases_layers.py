"""Layers and models"""

from collections.abc import Callable
from typing import Any

import keras
from case_registry import (
    CLASSES,
    CROSSENTROPY,
    DIFFERS,
    IMAGES,
    Result,
    Worker,
    X,
    Y,
    case,
    classifier,
    fitted,
)

NOT_SYNCHRONIZED = 'batch_norm="synchronize"'


class NormInBuild(keras.layers.Layer):
    """A block that makes its BatchNormalization in `build`."""

    def build(self, shape: Any) -> None:
        self.norm = keras.layers.BatchNormalization(name="inner_norm")
        self.norm.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.norm(x, training=training)


def normalised(**arguments: Any) -> Callable[[], keras.Model]:
    return lambda: classifier(lambda: keras.layers.BatchNormalization(name="norm", **arguments))


def convolutional(*middle: Callable[[], keras.Layer]) -> keras.Model:
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 3)),
            *[make() for make in middle],
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, "softmax"),
        ]
    )


@case(slow=False)
def synchronized_batch_normalization(worker: Worker) -> Result:
    """`BatchNormalization(synchronized=True)`, uneven batches included"""
    return fitted(worker.compiled(normalised(synchronized=True), CROSSENTROPY, metrics=["accuracy"]), X, Y)


@case(f"norm.*{NOT_SYNCHRONIZED}", slow=False)
def batch_normalization(worker: Worker) -> Result:
    """`BatchNormalization` that is not synchronized"""
    return fitted(worker.compiled(normalised(), CROSSENTROPY), X, Y)


@case(f"inner_norm.*{NOT_SYNCHRONIZED}")
def batch_normalization_made_in_build(worker: Worker) -> Result:
    """`BatchNormalization` that a layer makes in its `build`"""

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.dense = NormInBuild(), keras.layers.Dense(2, "softmax")

        def call(self, x: Any, training: bool = False) -> Any:
            return self.dense(self.block(x, training=training))

    return fitted(worker.compiled(Model, CROSSENTROPY), X, Y)


@case()
def batch_normalization_synchronized_by_enable(worker: Worker) -> Result:
    """`enable(model, batch_norm="synchronize")`, the layers made in `build` included"""
    make = lambda: classifier(NormInBuild, keras.layers.BatchNormalization)  # noqa: E731
    model = worker.compiled(make, CROSSENTROPY, metrics=["accuracy"], enable={"batch_norm": "synchronize"})
    return fitted(model, X, Y, validation_data=(X[:37], Y[:37]))


@case(f"norm.*{NOT_SYNCHRONIZED}")
def unfrozen_batch_normalization(worker: Worker) -> Result:
    """a frozen `BatchNormalization` that is unfrozen before another `compile`, without another `enable`"""

    def frozen() -> keras.Model:
        model = normalised()()
        model.get_layer("norm").trainable = False
        return model

    model = worker.compiled(frozen, CROSSENTROPY)
    model.fit(X, Y, epochs=1, verbose=0)
    model.get_layer("norm").trainable = True
    with worker.strategy.scope():
        model.compile("sgd", CROSSENTROPY)
    return fitted(model, X, Y)


@case()
def frozen_batch_normalization(worker: Worker) -> Result:
    """a frozen `BatchNormalization`"""

    def frozen() -> keras.Model:
        model = normalised()()
        model.get_layer("norm").trainable = False
        return model

    return fitted(worker.compiled(frozen, CROSSENTROPY), X, Y)


class OnAFixedBase(keras.Model):
    """A classifier on a trainable base with BatchNormalization that is called for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.dense = normalised()(), keras.layers.Dense(2, "softmax")

    def call(self, x: Any) -> Any:
        return self.dense(self.base(x, training=False))


@case()
def batch_normalization_called_for_inference(worker: Worker) -> Result:
    """`base(x, training=False)` of a trainable base with BatchNormalization, in a `call` of one's own"""
    return fitted(worker.compiled(OnAFixedBase, CROSSENTROPY, metrics=["accuracy"]), X, Y)


@case(f"norm.*{NOT_SYNCHRONIZED}")
def batch_normalization_of_the_fine_tuning_guide(worker: Worker) -> Result:
    """`base(x, training=False)` in a functional model, where Keras trains the base nevertheless (Keras issue 20285)"""

    def make() -> keras.Model:
        base = normalised()()
        base.trainable = True
        x = keras.Input((4,))
        return keras.Model(x, keras.layers.Dense(2, "softmax")(base(x, training=False)))

    return fitted(worker.compiled(make, CROSSENTROPY), X, Y)


@case()
def separable_convolution_without_rows(worker: Worker) -> Result:
    """SeparableConv2D, which TensorFlow cannot compute on no rows, and a last batch of one row"""
    layer = lambda: keras.layers.SeparableConv2D(4, 3, activation="relu")  # noqa: E731
    model = worker.compiled(lambda: convolutional(layer), CROSSENTROPY, lambda: keras.optimizers.SGD(2.0))
    return fitted(model, IMAGES, CLASSES, batch_size=8)


@case()
def convolutions_and_group_normalization(worker: Worker) -> Result:
    """Conv2D, GroupNormalization, DepthwiseConv2D and MaxPooling2D"""
    layers = keras.layers
    make = lambda: convolutional(  # noqa: E731
        lambda: layers.Conv2D(8, 3, padding="same"),
        lambda: layers.GroupNormalization(4),
        lambda: layers.DepthwiseConv2D(3, activation="relu"),
        layers.MaxPooling2D,
    )
    return fitted(worker.compiled(make, CROSSENTROPY), IMAGES, CLASSES, batch_size=8)


@case()
def attention_and_layer_normalization(worker: Worker) -> Result:
    """MultiHeadAttention and LayerNormalization with AdamW"""

    def make() -> keras.Model:
        x = keras.Input((8, 8, 3))
        tokens = keras.layers.Reshape((64, 3))(x)
        hidden = keras.layers.LayerNormalization()(keras.layers.Dense(8)(tokens))
        hidden = hidden + keras.layers.MultiHeadAttention(2, 4, use_bias=False)(hidden, hidden)
        return keras.Model(x, keras.layers.Dense(2, "softmax")(keras.layers.GlobalAveragePooling1D()(hidden)))

    model = worker.compiled(make, CROSSENTROPY, lambda: keras.optimizers.AdamW(0.01, epsilon=1e-3))
    return fitted(model, IMAGES, CLASSES, batch_size=8)


@case()
def recurrent_layers(worker: Worker) -> Result:
    """GRU and Bidirectional LSTM"""
    layers = keras.layers
    make = lambda: keras.Sequential(  # noqa: E731
        [
            layers.Input((8, 24)),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
            layers.GRU(4),
            layers.Dense(2, "softmax"),
        ]
    )
    return fitted(
        worker.compiled(make, CROSSENTROPY, lambda: keras.optimizers.SGD(0.5)),
        IMAGES.reshape(-1, 8, 24),
        CLASSES,
        batch_size=8,
    )


@case("gru.*has stateful=True.*stateful=False")
def stateful_recurrent_layer(worker: Worker) -> Result:
    """GRU with `stateful=True`"""
    layers = keras.layers
    make = lambda: keras.Sequential(  # noqa: E731
        [layers.Input(batch_shape=(8, 8, 24)), layers.GRU(4, stateful=True), layers.Dense(2, "softmax")]
    )
    model = worker.compiled(make, CROSSENTROPY)
    return fitted(model, IMAGES[:40].reshape(-1, 8, 24), CLASSES[:40], batch_size=8, shuffle=False)


@case(f"{DIFFERS}(variable .*running_mean|log loss)")
def layer_that_keeps_a_statistic_of_its_rows(worker: Worker) -> Result:
    """a layer of one's own that keeps a running mean of its inputs"""

    class RunningMean(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.mean = self.add_weight(shape=shape[1:], initializer="zeros", trainable=False, name="running_mean")

        def call(self, x: Any, training: bool = False) -> Any:
            if training:
                self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
            return x - self.mean

    return fitted(worker.compiled(lambda: classifier(RunningMean), CROSSENTROPY), X, Y)


@case()
def spectral_normalization(worker: Worker) -> Result:
    """SpectralNormalization, whose state follows from the weights alone"""
    layer = lambda: keras.layers.SpectralNormalization(keras.layers.Dense(4))  # noqa: E731
    return fitted(worker.compiled(lambda: classifier(layer), CROSSENTROPY), X, Y)


@case()
def optimizer_made_outside_of_the_scope(worker: Worker) -> Result:
    """an optimizer that is made before the scope of the strategy"""
    optimizer = keras.optimizers.Adam(0.01)
    return fitted(worker.compiled(classifier, CROSSENTROPY, lambda: optimizer), X, Y)


@case("the workers have different weights: .*kernel")
def weights_of_one_worker(worker: Worker) -> Result:
    """weights that one worker alone has loaded"""
    model = worker.compiled(classifier, CROSSENTROPY)
    if worker.rank:
        model.set_weights([value + 0.01 for value in model.get_weights()])
    return fitted(model, X, Y)


@case("the workers have different weights: .*mean")
def adapted_to_unequal_rows(worker: Worker) -> Result:
    """Normalization that each worker has adapted to its own rows"""

    def make() -> keras.Model:
        norm = keras.layers.Normalization()
        norm.adapt(X[worker.rank :: worker.num_workers])
        return keras.Sequential([keras.layers.Input((4,)), norm, keras.layers.Dense(2, "softmax")])

    return fitted(worker.compiled(make, CROSSENTROPY), X, Y)


@case("the workers have different weights: .*learning_rate")
def learning_rate_of_one_worker(worker: Worker) -> Result:
    """a learning rate that differs between the workers"""
    optimizer = lambda: keras.optimizers.SGD(0.1 * (worker.rank + 1))  # noqa: E731
    model = worker.compiled(classifier, CROSSENTROPY, optimizer)
    if worker.rank:
        model.optimizer.learning_rate.assign(0.3)
    return fitted(model, X, Y)


@case("outside of the scope of the strategy")
def made_outside_of_the_scope(worker: Worker) -> Result:
    """a model that is made outside of the scope of the strategy"""
    model = classifier()
    model.compile("sgd", CROSSENTROPY)
    return fitted(worker.enable(model), X, Y)
