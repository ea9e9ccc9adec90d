"""Losses"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import (
    BATCH,
    CLASSES,
    CROSSENTROPY,
    DIFFERS,
    IMAGES,
    ROWS,
    Result,
    T,
    Worker,
    X,
    Y,
    case,
    classifier,
    fitted,
    regressor,
)
from keras import ops

WORDS = np.random.default_rng(2).integers(1, 9, (ROWS, 6)).astype(np.int32)
# Sentences of 1 to 6 words, the longer ones first: the valid share of a batch's halves differs.
WORDS[np.arange(6) >= np.linspace(6, 1, ROWS)[:, None].round()] = 0
TAGS = WORDS % 3


def segmenter() -> keras.Model:
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, padding="same"),
            keras.layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )


MASKS = (IMAGES.mean(-1, keepdims=True) > np.linspace(0.1, 0.9, len(IMAGES))[:, None, None, None]).astype(np.float32)


@case(workers=(2, 3), slow=False)
def scalar_loss_function(worker: Worker) -> Result:
    """a loss function that returns a scalar mean"""
    model = worker.compiled(regressor, lambda y, p: ops.mean(ops.square(y - p)), metrics=["mae"])
    return fitted(model, X, T, validation_data=(X[:37], T[:37]))


@case()
def scalar_loss_class(worker: Worker) -> Result:
    """a subclass of `Loss` whose `call` returns a scalar mean"""

    class Huberish(keras.losses.Loss):
        def call(self, y_true: Any, y_pred: Any) -> Any:
            error = ops.cast(y_true, y_pred.dtype) - y_pred
            return ops.mean(ops.sqrt(1 + ops.square(error)))

    return fitted(worker.compiled(regressor, Huberish()), X, T)


@case(f"{DIFFERS}log loss")
def dice_of_the_batch(worker: Worker) -> Result:
    """`Dice()`, a ratio of sums over the batch"""
    return fitted(worker.compiled(segmenter, keras.losses.Dice()), IMAGES, MASKS)


@case(f"{DIFFERS}log loss")
def tversky_of_the_batch(worker: Worker) -> Result:
    """`Tversky(alpha=0.3, beta=0.7)`, a ratio of sums over the batch"""
    return fitted(worker.compiled(segmenter, keras.losses.Tversky(alpha=0.3, beta=0.7)), IMAGES, MASKS)


@case()
def dice_of_each_image(worker: Worker) -> Result:
    """`Dice(axis=(1, 2, 3))`, one ratio for each image"""
    return fitted(worker.compiled(segmenter, keras.losses.Dice(axis=(1, 2, 3))), IMAGES, MASKS)


@case(f"{DIFFERS}log loss")
def f1_loss_of_the_batch(worker: Worker) -> Result:
    """a soft F1 score of the batch as the loss"""

    def soft_f1(y: Any, p: Any) -> Any:
        hits = ops.sum(y * p, axis=0)
        return 1 - ops.mean(2 * hits / (ops.sum(y, axis=0) + ops.sum(p, axis=0) + 1e-7))

    return fitted(worker.compiled(classifier, soft_f1), X, np.eye(2, dtype=np.float32)[Y])


@case(slow=False)
def compute_loss_of_ones_own(worker: Worker) -> Result:
    """an override of `compute_loss` that returns a scalar mean"""

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            return ops.mean(ops.abs(y - y_pred)) + 0.01 * ops.mean(ops.square(y_pred))

    return fitted(worker.compiled(Model, metrics=["mse"]), X, T, validation_data=(X[:37], T[:37]))


@case(slow=False)
def mask_that_reaches_the_loss(worker: Worker) -> Result:
    """`mask_zero=True`: the loss is the mean over the valid words of the batch"""

    def tagger() -> keras.Model:
        return keras.Sequential(
            [
                keras.layers.Input((6,), dtype="int32"),
                keras.layers.Embedding(9, 4, "normal", mask_zero=True),
                keras.layers.LSTM(4, return_sequences=True),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )

    # In the order of their lengths, so that the workers' shares of each batch have unequal masks.
    model = worker.compiled(tagger, CROSSENTROPY, lambda: keras.optimizers.SGD(5.0), metrics=["accuracy"])
    return fitted(model, WORDS, TAGS, shuffle=False, validation_data=(WORDS[::2], TAGS[::2]))


@case()
def ignored_class(worker: Worker) -> Result:
    """`SparseCategoricalCrossentropy(ignore_class=-1)`"""
    labels = np.where(np.arange(ROWS) % 16 > 4, Y, -1)  # more of the first rows of a batch are ignored
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    return fitted(worker.compiled(classifier, loss), X, labels, shuffle=False)


@case()
def mask_and_sample_weights(worker: Worker) -> Result:
    """a mask together with sample weights of the words"""

    def tagger() -> keras.Model:
        words = keras.Input((6,), dtype="int32")
        hidden = keras.layers.Embedding(9, 4, mask_zero=True)(words)
        return keras.Model(words, keras.layers.Dense(3, activation="softmax")(hidden))

    weights = np.random.default_rng(3).uniform(0.2, 2, (ROWS, 6)).astype(np.float32)
    model = worker.compiled(tagger, CROSSENTROPY, lambda: keras.optimizers.SGD(0.5), weighted_metrics=["accuracy"])
    return fitted(model, WORDS, TAGS, sample_weight=weights, shuffle=False)


@case("reduction='sum'")
def reduction_sum(worker: Worker) -> Result:
    """a loss with `reduction="sum"`"""
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="sum")
    return fitted(worker.compiled(classifier, loss, lambda: keras.optimizers.SGD(0.01)), X, Y)


@case("reduction='mean_with_sample_weight'")
def reduction_mean_with_sample_weight(worker: Worker) -> Result:
    """a loss with `reduction="mean_with_sample_weight"`"""
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight")
    return fitted(worker.compiled(classifier, loss), X, Y, sample_weight=np.linspace(0.1, 2, ROWS, dtype=np.float32))


@case(f"{DIFFERS}log loss")
def sum_by_add_loss(worker: Worker) -> Result:
    """`add_loss` of a sum over the batch"""

    class Penalty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.01 * ops.sum(ops.square(x)))
            return x

    return fitted(worker.compiled(lambda: classifier(Penalty), CROSSENTROPY), X, Y)


@case()
def mean_by_add_loss(worker: Worker) -> Result:
    """`add_loss` of a mean over the batch"""

    class Penalty(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.1 * ops.mean(ops.square(x)))
            return x

    return fitted(worker.compiled(lambda: classifier(Penalty), CROSSENTROPY), X, Y)


@case()
def activity_regularizer(worker: Worker) -> Result:
    """`activity_regularizer`, which Keras divides by the rows of the batch"""
    return fitted(
        worker.compiled(lambda: classifier(lambda: keras.layers.Dense(4, activity_regularizer="l2")), CROSSENTROPY),
        X,
        Y,
    )


@case()
def weight_regularizers(worker: Worker) -> Result:
    """`kernel_regularizer` and `bias_regularizer`"""
    layer = lambda: keras.layers.Dense(4, kernel_regularizer="l2", bias_regularizer="l1")  # noqa: E731
    return fitted(worker.compiled(lambda: classifier(layer), CROSSENTROPY), X, Y)


@case(f"{DIFFERS}log loss")
def contraction_over_the_batch(worker: Worker) -> Result:
    """a layer that contracts over the rows of the batch"""

    class Whiten(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x @ (ops.transpose(x) @ x) / BATCH

    return fitted(worker.compiled(lambda: classifier(Whiten), CROSSENTROPY), X, Y)


@case()
def loss_weights_and_several_outputs(worker: Worker) -> Result:
    """several outputs, of which one has a scalar loss function"""

    def make() -> keras.Model:
        x = keras.Input((4,))
        hidden = keras.layers.Dense(8, "tanh")(x)
        return keras.Model(
            x,
            {
                "class": keras.layers.Dense(2, "softmax", name="class")(hidden),
                "t": keras.layers.Dense(1, name="t")(hidden),
            },
        )

    losses = {"class": CROSSENTROPY, "t": lambda y, p: ops.mean(ops.abs(y - p))}
    model = worker.compiled(make, losses, loss_weights={"class": 1.0, "t": 0.3}, metrics={"class": "accuracy"})
    return fitted(model, X, {"class": Y, "t": T})


@case()
def ragged_images_of_two_sizes(worker: Worker) -> Result:
    """batches of images of different sizes, in a `tf.data.Dataset`"""

    def make() -> keras.Model:
        return keras.Sequential(
            [
                keras.layers.Input((None, None, 3)),
                keras.layers.Conv2D(4, 3, activation="relu"),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(2, "softmax"),
            ]
        )

    large = tf.data.Dataset.from_tensor_slices((IMAGES[:20], CLASSES[:20])).batch(8)
    small = tf.data.Dataset.from_tensor_slices((IMAGES[20:, :5, :6], CLASSES[20:])).batch(8)
    model = worker.compiled(make, CROSSENTROPY, lambda: keras.optimizers.SGD(2.0))
    return fitted(model, large.concatenate(small))
