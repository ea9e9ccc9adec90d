"""Sequences of unequal length"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import DIFFERS, Result, Worker, case, dataset, fitted
from keras import layers, ops


def tagged(longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tags of 41 sentences; their lengths fall from `longest`, which is cut at 7, to 1."""
    tokens = np.random.default_rng(6).integers(1, 9, (41, 7))
    tokens[np.arange(7) >= np.linspace(longest, 1, 41).round()[:, None]] = 0
    return tokens, np.where(tokens > 0, 1 + tokens % 3, 0)


class CustomNonPaddingTokenLoss(keras.losses.Loss):
    """Mean over the tokens that are no padding, as on keras.io."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        loss = ops.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        mask = ops.cast(y_true > 0, "float32")
        return ops.sum(loss * mask) / ops.sum(mask)


def recognizer() -> keras.Model:
    x = keras.Input((7,), dtype="int32")
    hidden = layers.Embedding(9, 8)(x)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 4)(hidden, hidden))
    return keras.Model(x, layers.Dense(4)(hidden))


@case(f"{DIFFERS}log loss")
def named_entities_with_a_masked_loss(worker: Worker) -> Result:
    """NER: a loss that divides by the number of tokens that are no padding"""
    return fitted(worker.compiled(recognizer, CustomNonPaddingTokenLoss()), dataset(*tagged(7), size=8))


@case(f"{DIFFERS}log loss")
def named_entities_padded_later(worker: Worker) -> Result:
    """the same, where the first batch has no padding"""
    return fitted(worker.compiled(recognizer, CustomNonPaddingTokenLoss()), dataset(*tagged(12), size=8))


@case()
def named_entities_with_sample_weights(worker: Worker) -> Result:
    """NER with the padding as sample weights of 0"""
    tokens, tags = tagged(7)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = dataset(tokens, tags, (tokens > 0).astype(np.float32), size=8)
    return fitted(worker.compiled(recognizer, loss, weighted_metrics=["accuracy"]), data)


@case()
def text_classification_with_a_mask(worker: Worker) -> Result:
    """a mask that ends in a recurrent layer and in GlobalAveragePooling1D"""

    def make() -> keras.Model:
        x = keras.Input((7,), dtype="int32")
        words = layers.Embedding(9, 8, mask_zero=True)(x)
        hidden = layers.Concatenate()([layers.GRU(4)(words), layers.GlobalAveragePooling1D()(words)])
        return keras.Model(x, layers.Dense(1, "sigmoid")(hidden))

    tokens, _ = tagged(7)
    model = worker.compiled(make, "binary_crossentropy", lambda: keras.optimizers.SGD(0.5), metrics=["accuracy"])
    return fitted(model, tokens, (tokens[:, :1] > 4).astype(np.float32), batch_size=8)


@case()
def padded_by_each_worker(worker: Worker) -> Result:
    """`distribute` of batches that each worker pads to its own longest sentence, with a mask that reaches the loss"""

    def make() -> keras.Model:
        return keras.Sequential(
            [layers.Input((None,), dtype="int32"), layers.Embedding(9, 8, mask_zero=True), layers.Dense(3)]
        )

    lengths = np.where(np.arange(32) % 8 < 4, 3, 12)  # the first half of a batch is short, the other long
    sentences = [np.random.default_rng(number).integers(1, 9, length) for number, length in enumerate(lengths)]
    own = np.array_split(np.arange(8), worker.num_workers)[worker.rank]

    def words() -> Any:
        for sentence in (sentences[start + row] for start in range(0, 32, 8) for row in own):
            yield sentence, sentence % 3

    of_words = tf.TensorSpec((None,), tf.int32)
    data = tf.data.Dataset.from_generator(words, output_signature=(of_words, of_words)).padded_batch(len(own))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batches = worker.distribute(data)
    model = worker.compiled(make, loss, lambda: keras.optimizers.SGD(0.5))
    return fitted(model, batches, validation_data=batches)
