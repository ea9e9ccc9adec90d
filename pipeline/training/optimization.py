"""Loss, metrics, optimizer and learning-rate schedule that a `TrainingConfig` names.

The loss and the metrics take integer labels as well as the class shares of mixed images; those of Keras take one or the
other, and Keras smooths one-hot labels alone.
"""

import re
from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops

from pipeline.training.config import TrainingConfig
from pipeline.training.muon import Muon

SGD_MOMENTUM = 0.9
PLATEAU_FACTOR = 0.2


@keras.saving.register_keras_serializable(package="pipeline")
class SmoothedCrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of logits (B, K) with label smoothing (Szegedy et al., 2016) and weights of the classes.

    The truth is either integer labels (B,) or, for mixed images, the share of each class (B, K). The loss of a row is
    multiplied by the weight of its class; that of a mixed image is the mean, by their shares, of the weighted losses
    that its classes would have as labels. The mean over rows divides by their number, not by the sum of their weights,
    so that it is the same for any division of a batch among workers.

    Args:
        label_smoothing: Share of the target given to all classes alike.
        class_weights: K factors; None: all 1.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        name: str = "cross_entropy",
        **kwargs: object,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else list(class_weights)

    def call(self, y_true, y_pred):  # type: ignore[no-untyped-def]
        num_classes = y_pred.shape[-1]
        if y_true.shape[1:] == (num_classes,):
            targets = ops.cast(y_true, y_pred.dtype)
        else:
            targets = ops.one_hot(ops.cast(ops.reshape(y_true, (-1,)), "int32"), num_classes, dtype=y_pred.dtype)
        if self.class_weights is None:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / num_classes
            return ops.categorical_crossentropy(targets, y_pred, from_logits=True)
        targets = targets * ops.convert_to_tensor(self.class_weights, y_pred.dtype)
        of_row = ops.sum(targets, axis=-1, keepdims=True)
        targets = targets * (1 - self.label_smoothing) + of_row * self.label_smoothing / num_classes
        # Not by the function above: TensorFlow's gradient of it takes the targets' sum for 1.
        return -ops.sum(targets * ops.log_softmax(y_pred, axis=-1), axis=-1)

    def get_config(self) -> dict[str, object]:
        own = {"label_smoothing": self.label_smoothing, "class_weights": self.class_weights}
        return {**super().get_config(), **own}


def balanced_weights(class_counts: Sequence[int]) -> list[float]:
    """Weights of the classes with which each class that has rows counts alike: N / (K n) for a class with n of N rows.

    K is the number of classes with rows. The mean of the weights over all rows is 1; a class without rows gets 0.
    """
    num_rows, num_classes = sum(class_counts), sum(count > 0 for count in class_counts)
    return [num_rows / (num_classes * count) if count else 0.0 for count in class_counts]


class _TakesShares:
    """Lets a sparse metric take class shares too; the label of a mixed image is that of its larger part."""

    def update_state(self, y_true, y_pred, sample_weight=None):  # type: ignore[no-untyped-def]
        if y_true.shape[1:] == (y_pred.shape[-1],):
            y_true = ops.argmax(y_true, axis=-1)
        super().update_state(y_true, y_pred, sample_weight)  # type: ignore[misc]  # the other base class


@keras.saving.register_keras_serializable(package="pipeline")
class Accuracy(_TakesShares, keras.metrics.SparseCategoricalAccuracy):
    """Share of rows whose label has the highest logit.

    Of equal logits the first counts, whereas `TopKAccuracy(1)` counts each as a hit.
    """


@keras.saving.register_keras_serializable(package="pipeline")
class TopKAccuracy(_TakesShares, keras.metrics.SparseTopKCategoricalAccuracy):
    """Share of rows whose label is among the k highest logits."""


class Rates:
    """The highest learning rate and the weight decay as variables, which a traced step reads, instead of constants."""

    def __init__(self, config: TrainingConfig) -> None:
        self.learning_rate = tf.Variable(config.learning_rate, trainable=False, dtype="float32")
        self.weight_decay = tf.Variable(config.weight_decay, trainable=False, dtype="float32")

    def set(self, config: TrainingConfig) -> None:
        self.learning_rate.assign(config.learning_rate)
        self.weight_decay.assign(config.weight_decay)


def learning_rate(
    config: TrainingConfig, steps_per_epoch: int, rates: Rates | None = None
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate, or its schedule over all steps of the training; from `rates`, if they are given."""
    if config.learning_rate_schedule != "cosine":
        return config.learning_rate
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    highest = rates.learning_rate if rates else config.learning_rate
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else highest,
        decay_steps=total - warmup,
        warmup_target=highest if warmup else None,
        warmup_steps=warmup,
    )


def optimizer(
    config: TrainingConfig, model: keras.Model, steps_per_epoch: int, rates: Rates | None = None
) -> keras.optimizers.Optimizer:
    """The optimizer of a built `model`; its weight decay, if any, acts on kernels only (Loshchilov & Hutter, 2019).

    Where `rates` are given, it reads the two from there in every step.
    """
    rate = learning_rate(config, steps_per_epoch, rates)
    decay = config.weight_decay or None
    if config.optimizer == "adam":
        return keras.optimizers.Adam(rate)
    if config.optimizer == "sgd":
        made = keras.optimizers.SGD(rate, momentum=SGD_MOMENTUM, weight_decay=decay)
    elif config.optimizer == "muon":
        # Keras uses Muon for every 2-D variable. Latents and positions are embeddings, though, and the kernel of the
        # logits is a classifier, for which Jordan et al. (2024) advise against it.
        kernels = {id(v) for v in model.trainable_variables if v.name == "kernel"} - {id(_classifier(model))}
        others = [f"^{re.escape(v.path)}$" for v in model.trainable_variables if id(v) not in kernels]
        made = Muon(
            rate,
            weight_decay=decay,
            adam_weight_decay=decay,
            exclude_layers=others,
            ns_steps=config.muon_steps,
        )
    elif config.optimizer == "lamb":
        made = keras.optimizers.Lamb(rate, weight_decay=decay)
    else:
        made = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay)
    if made.weight_decay:
        made.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if v.name != "kernel"])
        if rates:
            made.weight_decay = rates.weight_decay
            if isinstance(made, Muon):
                made.adam_weight_decay = rates.weight_decay
    return made


def _classifier(model: keras.Model) -> keras.Variable | None:
    """The kernel of the logits: of the layer that the model has under this name, or else the last kernel of all."""
    if hasattr(model, "logits"):
        return model.logits.kernel
    return next((v for v in reversed(model.trainable_variables) if v.name == "kernel"), None)
