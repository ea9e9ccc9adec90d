"""The private names of Keras and TensorFlow that this package relies on, and their comparison with the installed ones.

No other module of the package imports anything from `keras.src` or `tensorflow.python`.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import masking as keras_masking
from keras.src.backend.tensorflow import nn as keras_nn
from keras.src.backend.tensorflow import optimizer as keras_optimizer
from keras.src.backend.tensorflow import random as keras_random
from keras.src.backend.tensorflow import trainer as keras_trainer
from keras.src.losses import loss as keras_loss
from keras.src.optimizers import base_optimizer
from keras.src.trainers import compile_utils
from tensorflow.python.distribute import collective_all_reduce_strategy, cross_device_utils
from tensorflow.python.distribute import values as tf_values
from tensorflow.python.eager import context as tf_eager
from tensorflow.python.ops import random_ops as tf_random

Trainer = keras_trainer.TensorFlowTrainer
EpochIterator = keras_trainer.TFEpochIterator
Optimizer = keras_optimizer.TFOptimizer
BaseOptimizer = base_optimizer.BaseOptimizer
CompileMetrics = compile_utils.CompileMetrics
loss_module, nn_module, random_module = keras_loss, keras_nn, keras_random
get_keras_mask, set_keras_mask = keras_masking.get_keras_mask, keras_masking.set_keras_mask
tf_random_module, tf_context, tf_values_module = tf_random, tf_eager, tf_values

# Functions and methods that are overridden or called: their owner, and their parameters in the version that this
# package was written for.
PRIVATE_NAMES: dict[str, tuple[Any, tuple[str, ...]]] = {
    # These reduce the inputs over the workers, which fails: https://github.com/keras-team/keras/issues/20585
    "_maybe_symbolic_build": (Trainer, ("self", "iterator", "data_batch")),
    "_symbolic_build": (Trainer, ("self", "iterator", "data_batch")),
    # The functions that these create reduce scalar logs along an axis, which fails: the same issue.
    "make_train_function": (Trainer, ("self", "force")),
    "make_test_function": (Trainer, ("self", "force")),
    "make_predict_function": (Trainer, ("self", "force")),
    "_autoconvert_optionals": (Trainer, ("self", "step_func")),
    # Where `predict` takes its batches from.
    "_get_iterator": (EpochIterator, ("self",)),
    # Reads the metrics of this worker where they were created outside of the strategy's scope.
    "_get_metrics_result_or_logs": (Trainer, ("self", "logs")),
    # Clips and accumulates the gradients of one worker before it sums them over all workers. With accumulation the sum
    # is inside a condition, which fails: https://github.com/keras-team/keras/issues/20582
    "_backend_apply_gradients": (Optimizer, ("self", "grads", "trainable_variables")),
    "_all_reduce_sum_gradients": (Optimizer, ("self", "grads_and_vars")),
    "apply": (BaseOptimizer, ("self", "grads", "trainable_variables")),
    # Whether variables are updated through all replicas of a worker, which fails inside a condition: the same issue.
    "_use_merge_call": (collective_all_reduce_strategy.CollectiveAllReduceExtended, ("self",)),
    # Takes the first replica's value for a variable such as the count of steps, by a call that fails where a function
    # within the step assigns it.
    "apply_aggregation_replica_context": (tf_values, ("value", "aggregation", "destinations")),
    # Divide a loss by the number of replicas, and undo it, but only where the loss is reduced by Keras itself.
    "scale_loss_for_distribution": (keras_loss, ("value",)),
    "unscale_loss_for_distribution": (keras_loss, ("value",)),
    # Rescales the loss by the share of valid entries among the rows of one worker.
    "apply_mask": (keras_loss, ("sample_weight", "mask", "dtype", "reduction")),
    # The mask that a tensor has as an attribute, which it loses where it leaves a function.
    "get_keras_mask": (keras_masking, ("x",)),
    "set_keras_mask": (keras_masking, ("x", "mask")),
    # Passes `training` to a `compute_loss` that takes it.
    "_compute_loss": (Trainer, ("self", "x", "y", "y_pred", "sample_weight", "training")),
    # The moments of BatchNormalization.
    "_moments": (keras.layers.BatchNormalization, ("self", "inputs", "mask")),
    "_compute_moments_sync": (keras_nn, ("x", "axes", "keepdims")),
    # Gives a variable its value that was made while a model was built symbolically.
    "_deferred_initialize": (keras.Variable, ("self",)),
    "_flatten_layers": (keras.Layer, ("self", "include_self", "recursive")),
    # Whether each call of a collective operation in a function gets a number of its own, which TensorFlow then keeps.
    "_use_unique_instance_key": (cross_device_utils.CollectiveReplicaLauncher, ("self",)),
    # The store of keys and values that all workers share.
    "set_config_key_value": (tf_context.Context, ("self", "key", "value")),
    "get_config_key_value": (tf_context.Context, ("self", "key", "timeout_in_ms")),
    "abort_collective_ops": (tf_context.Context, ("self", "code", "message")),
}
# Attributes that are read. `check_keras` looks for them on objects that it creates.
PRIVATE_ATTRIBUTES = {
    "Model": ("_loss_tracker", "_call_has_training_arg"),
    "TFEpochIterator": (
        "_distributed_dataset",
        "_interrupted_warning",
        "_steps_seen",
        "data_adapter",
        "reset",
        "steps_per_epoch",
        "steps_per_execution",
    ),
    "BaseOptimizer": ("_distribution_strategy",),
}


def check_keras() -> None:
    """Compares the private names that this package relies on with those of the installed Keras.

    Raises:
        RuntimeError: if a name is missing or takes other parameters; the message contains it and the Keras version.
    """
    remedy = "read the Keras source beside it and adapt the package multiworker, or pin Keras 3.15"
    for name, (owner, expected) in PRIVATE_NAMES.items():
        method = getattr(owner, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise RuntimeError(
                f"Keras {keras.__version__} has {owner.__name__}.{name}{found} instead of {expected}: {remedy}"
            )
    # Another initializer would draw its seed from Python's random numbers, which are those of the user's layers.
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(loss="mse")
    iterator = EpochIterator(x=tf.zeros((1, 1)), distribute_strategy=tf.distribute.get_strategy())
    for made in (model, iterator, model.optimizer):
        kind = next(cls.__name__ for cls in type(made).__mro__ if cls.__name__ in PRIVATE_ATTRIBUTES)
        for name in PRIVATE_ATTRIBUTES[kind]:
            if not hasattr(made, name):
                raise RuntimeError(f"Keras {keras.__version__} has no {kind}.{name}: {remedy}")


def iterator_of_validations(model: keras.Model) -> Any:
    """The iterator that `fit` uses for all validations; None outside of a `fit` that validates."""
    return getattr(model, "_eval_epoch_iterator", None)


def local_spec(spec: Any) -> Any:
    """The specification of the first replica's values in that of distributed values."""
    return tf.nest.map_structure(
        lambda value: value._value_specs[0] if isinstance(value, tf_values.PerReplicaSpec) else value, spec
    )


@contextlib.contextmanager
def collectives_that_are_repeated() -> Iterator[None]:
    """The collective operations of a function that is traced in this context have the same numbers in every call.

    Otherwise TensorFlow asks the first worker in every call about an operation that it has not seen, and keeps what it
    was told: some kB in every step. All workers have to trace as many functions in the same order.
    """
    launcher = cross_device_utils.CollectiveReplicaLauncher
    with replaced(launcher, "_use_unique_instance_key", lambda self: False):
        yield


def plain_variables(model: keras.Model) -> list[tf.Variable]:
    """The variables of TensorFlow that are attributes of a model or of its layers, which Keras does not track."""
    found = {
        id(inner): inner
        for layer in model._flatten_layers()
        for value in vars(layer).values()
        for inner in (value if isinstance(value, list | tuple) else [value])
        if isinstance(inner, tf.Variable)
    }
    return list(found.values())


def owner_of(cls: type, name: str) -> Any:
    """The class in which `cls` finds an attribute."""
    return next(owner for owner in cls.__mro__ if name in vars(owner))


def adopt(optimizer: Any, strategy: tf.distribute.Strategy) -> None:
    """Lets an optimizer that was created outside of the strategy's scope, and those within it, use the strategy."""
    if optimizer._distribution_strategy is strategy:
        return
    optimizer._distribution_strategy = strategy
    for value in vars(optimizer).values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, BaseOptimizer):
                adopt(inner, strategy)


def optimizer_classes() -> Iterator[Any]:
    """Yields the classes with an `apply` of their own: Keras's base class and all classes derived from it."""
    waiting = [BaseOptimizer]
    while waiting:
        owner = waiting.pop()
        waiting.extend(owner.__subclasses__())
        if "apply" in vars(owner):
            yield owner


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute within this context and restores it afterwards."""
    own = vars(owner).get(name)  # None if it is inherited from a class
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
