"""What Keras 3 lacks to `fit` and `evaluate` on several workers under MultiWorkerMirroredStrategy; nothing else.

Stock Keras 3.15 fails there (https://github.com/keras-team/keras/issues/20585). Two steps mend it:

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = ...
        model.compile(...)
    multiworker.enable(model)
    model.fit(multiworker.distribute(local_dataset, strategy), validation_data=..., ...)

`local_dataset` yields this worker's share of every global batch: all workers the same number of batches, of sizes that
may differ in validation. Quickest are endless data sets with `steps_per_epoch` and `validation_steps`, see `enable`.
It needs neither Ray nor the rest of this project, only TF_CONFIG. All private names of Keras that the project touches
are in this module; `check_keras` says which.
"""

import inspect
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import trainer as keras_trainer

# What `enable` overrides or calls, and the parameters that each has in the Keras that it was written for.
PRIVATE_NAMES = {
    "_maybe_symbolic_build": ("self", "iterator", "data_batch"),
    "_symbolic_build": ("self", "iterator", "data_batch"),
}


class StopSignal:
    """A request to stop that all workers see after the same step.

    Any thread of any worker may `request`; the next training step sums the requests over all workers, so that none goes
    on into a collective operation that the others never join.
    """

    def __init__(self) -> None:
        # Made outside of any strategy scope: one plain variable a process.
        self._requested = tf.Variable(0.0, trainable=False)
        self._agreed = tf.Variable(0.0, trainable=False)

    def request(self) -> None:
        self._requested.assign(1.0)

    def exchange(self) -> None:
        """Sums the requests over all workers; called inside a training step, in replica context."""
        replica = tf.distribute.get_replica_context()
        self._agreed.assign(replica.all_reduce(tf.distribute.ReduceOp.SUM, self._requested.read_value()))

    @property
    def agreed(self) -> bool:
        """Whether the last step found a request at any worker: the same answer at all of them."""
        return bool(self._agreed.numpy() > 0)


def check_keras() -> None:
    """Compares the private names that this module relies on with the installed Keras.

    Raises:
        RuntimeError: if one is gone or takes other parameters; names it and the Keras version.
    """
    trainer = keras_trainer.TensorFlowTrainer
    for name, expected in PRIVATE_NAMES.items():
        method = getattr(trainer, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise RuntimeError(
                f"Keras {keras.__version__} has {name}{found}, but pipeline/multiworker.py was written for "
                f"{name}{expected}: read keras/src/backend/tensorflow/trainer.py and adapt `enable`, or pin Keras 3.15"
            )
    if not hasattr(keras_trainer, "reduce_per_replica"):
        raise RuntimeError(
            f"Keras {keras.__version__} has no reduce_per_replica in its TensorFlow trainer any more: see whether "
            "scalar logs are now reduced correctly over workers, and adapt `enable`"
        )


def enable(model: keras.Model, stop: StopSignal | None = None) -> None:
    """Makes `fit` and `evaluate` of a compiled model work under the MultiWorkerMirroredStrategy it was made in.

    The methods are replaced on the instance, so the class, and with it a saved `.keras` file, stays what it was. A
    model that was made without a strategy trains as before, only that its metrics are built before the first step.

    Args:
        model: a model built and compiled inside `strategy.scope()`.
        stop: exchanged over the workers in every training step, if given.

    Raises:
        RuntimeError: if the installed Keras does not have the private names that this relies on.
    """
    check_keras()
    strategy = model.distribute_strategy
    train_step, test_step, symbolic_build = model.train_step, model.test_step, model._maybe_symbolic_build

    def maybe_symbolic_build(iterator: Any = None, data_batch: Any = None) -> None:
        # Keras would reduce the *inputs* over all replicas here, which fails; one replica's batch has the shapes.
        if iterator is None:
            symbolic_build(data_batch=data_batch)
            return
        if "reset" in vars(iterator):  # seen before, see below
            return
        _, _, batches = next(iter(iterator))
        local = tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], next(batches))
        with strategy.scope():
            model._symbolic_build(data_batch=local)
        if iterator.steps_per_epoch:
            # `fit` comes back with the same iterator for every validation and then resets it. To let an old iterator of
            # tf.data go can take a worker up to a minute, in which all others wait for it: its destructor waits for the
            # autotuner, which sleeps the longer the longer it has run. So one over endless data just goes on.
            iterator.reset()
            iterator.reset = lambda: None

    def vector_logs(logs: dict[str, Any]) -> dict[str, tf.Tensor]:
        # Keras reduces logs with `strategy.reduce("MEAN", value, axis=0)`, an axis that a scalar does not have.
        return {name: tf.reshape(value, [1]) for name, value in logs.items()}

    def training(data: Any) -> dict[str, tf.Tensor]:
        if stop is not None:
            stop.exchange()
        return vector_logs(train_step(data))

    def testing(data: Any) -> dict[str, tf.Tensor]:
        return vector_logs(test_step(data))

    model._maybe_symbolic_build = maybe_symbolic_build
    model.train_step = training
    model.test_step = testing


def distribute(dataset: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """`dataset` as it is, as this worker's share; `fit` would take it for global batches and divide it again."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return dataset
    return strategy.distribute_datasets_from_function(lambda _: dataset)
