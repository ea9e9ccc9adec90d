"""Makes `fit`, `evaluate` and `predict` of Keras 3 work on several workers under MultiWorkerMirroredStrategy.

Stock Keras 3.15 fails there (https://github.com/keras-team/keras/issues/20585). One call fixes it:

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)  # the same on every worker, because each worker shuffles the data itself
    with strategy.scope():
        model = ...
        model.compile(...)
    multiworker.enable(model)
    model.fit(x, y, batch_size=128, validation_data=(x_val, y_val), ...)

Arrays and `tf.data.Dataset`s are passed as in a single process: every worker is given all rows, in global batches and
in the same order, and trains on its share of each batch. A worker that holds only its own rows passes
`distribute(its_batches, strategy)` instead.

The module needs only TF_CONFIG, and neither Ray nor the rest of this project. docs/multiworker.md lists what works,
what is refused, and why. All private names of Keras that the project uses are in this module; `check_keras` compares
them with the installed Keras.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import optimizer as keras_optimizer
from keras.src.backend.tensorflow import trainer as keras_trainer
from tensorflow.python.distribute import collective_all_reduce_strategy

_Trainer = keras_trainer.TensorFlowTrainer
_Optimizer = keras_optimizer.TFOptimizer

# Private methods that are overridden or called: their class, and their parameters in the Keras version that this module
# was written for.
PRIVATE_NAMES: dict[str, tuple[type, tuple[str, ...]]] = {
    # These reduce the inputs over the workers, which fails: https://github.com/keras-team/keras/issues/20585
    "_maybe_symbolic_build": (_Trainer, ("self", "iterator", "data_batch")),
    "_symbolic_build": (_Trainer, ("self", "iterator", "data_batch")),
    # The functions that these create reduce scalar logs along an axis, which fails: the same issue.
    "make_train_function": (_Trainer, ("self", "force")),
    "make_test_function": (_Trainer, ("self", "force")),
    "_autoconvert_optionals": (_Trainer, ("self", "step_func")),
    # Clips and accumulates the gradients of one worker before it sums them over all workers. With accumulation the sum
    # is inside a condition, which fails: https://github.com/keras-team/keras/issues/20582
    "_backend_apply_gradients": (_Optimizer, ("self", "grads", "trainable_variables")),
    "_all_reduce_sum_gradients": (_Optimizer, ("self", "grads_and_vars")),
    # Whether variables are updated through all replicas of a worker, which fails inside a condition: the same issue.
    "_use_merge_call": (collective_all_reduce_strategy.CollectiveAllReduceExtended, ("self",)),
    "_flatten_layers": (keras.Layer, ("self", "include_self", "recursive")),
}
# Attributes that are read. `check_keras` looks for them on objects that it creates.
PRIVATE_ATTRIBUTES = {
    "Model": ("_loss_tracker", "_compile_loss", "_call_has_training_arg", "_seed_generators"),
    "TFEpochIterator": ("_distributed_dataset", "_interrupted_warning", "steps_per_epoch", "reset"),
    "ArrayDataAdapter": ("_shuffle",),
}

# Loss reductions that are means over the rows of a batch. Only for these is it correct to weight workers by their rows.
MEANS = ("sum_over_batch_size", "mean")
# Odd and large, so that layers with neighbouring seeds do not get each other's dropout masks on other workers.
SEED_STRIDE = 0x9E3779B1
# The seed that TensorFlow uses if `tf.random.set_seed` was not called.
UNSET_SEED = 87654321


class StopSignal:
    """A request to stop that all workers see after the same step.

    Any thread of any worker may call `request`. The requests are summed over the workers together with the gradients of
    the next training step, so that no worker starts a collective operation that the others never join.
    """

    def __init__(self) -> None:
        # Created outside any strategy scope, so that they are plain variables of this process.
        self.requested = tf.Variable(0.0, trainable=False)
        self.sum_over_workers = tf.Variable(0.0, trainable=False)

    def request(self) -> None:
        self.requested.assign(1.0)

    @property
    def agreed(self) -> bool:
        """Whether the last step found a request on any worker; all workers get the same answer."""
        return bool(self.sum_over_workers.numpy() > 0)


def check_keras() -> None:
    """Compares the private names that this module relies on with those of the installed Keras.

    Raises:
        RuntimeError: if a name is missing or takes other parameters; the message contains it and the Keras version.
    """
    remedy = "read the Keras source beside it and adapt pipeline/multiworker.py, or pin Keras 3.15"
    for name, (owner, expected) in PRIVATE_NAMES.items():
        method = getattr(owner, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise RuntimeError(
                f"Keras {keras.__version__} has {owner.__name__}.{name}{found} instead of {expected}: {remedy}"
            )
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dropout(0.5)])
    model.compile(loss="mse")
    iterator = keras_trainer.TFEpochIterator(x=tf.zeros((1, 1)), distribute_strategy=tf.distribute.get_strategy())
    for made in (model, iterator, iterator.data_adapter):
        kind = next(cls.__name__ for cls in type(made).__mro__ if cls.__name__ in PRIVATE_ATTRIBUTES)
        for name in PRIVATE_ATTRIBUTES[kind]:
            if not hasattr(made, name):
                raise RuntimeError(f"Keras {keras.__version__} has no {kind}.{name}: {remedy}")
    if len(model.layers[-1]._seed_generators) != 1:
        raise RuntimeError(f"Keras {keras.__version__} keeps seeds elsewhere than in _seed_generators: {remedy}")


def enable(model: keras.Model, stop: StopSignal | None = None, note: Callable[[str, Any], Any] | None = None) -> None:
    """Makes `fit`, `evaluate` and `predict` of a compiled model work under the strategy that it was created in.

    The loss, the metrics, the gradients and therefore the weights are those of the global batch, whatever the number of
    workers and however many rows of a batch each of them has. Gradients are clipped, accumulated and checked for
    infinities after they have been summed over the workers. Random layers draw different numbers on each worker. With
    `compile(jit_compile=True)`, XLA compiles the forward and backward pass; the collectives, which XLA does not support
    on a CPU, stay outside.

    The methods are replaced on the instance, so neither the class nor a saved `.keras` file changes. A model that was
    created without a strategy trains as before, except that sparse gradients are made dense there too.

    Args:
        model: Model compiled inside `strategy.scope()`. Call `enable` again after another `compile`.
        stop: If given, its requests are exchanged between the workers in each training step.
        note: Called in each training step, outside what XLA compiles, with the name of a moment and the tensors that
            are computed by then: "data" with the batch; with several workers also "reduce" before the gradients are
            summed over them and "reduced" afterwards. The step continues with the tensors that `note` returns, so that
            operations that measure can be placed before the operations that follow.

    Raises:
        RuntimeError: if the installed Keras lacks a private name that this module relies on.
        ValueError: if the model has a part that would silently behave differently on several workers; the message
            contains the part and the remedy.
    """
    check_keras()
    _MultiWorker(model, stop, note or (lambda moment, tensors: tensors)).take_over()


def distribute(dataset: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Any:
    """Wraps a dataset of this worker's batches, so that `fit` does not divide it among the workers again.

    A global batch consists of the batches that all workers yield in one step. Workers may yield batches of different
    sizes and different numbers of batches: a worker that has run out takes part with empty batches until the last
    worker has run out. In each step the workers have to ask each other whether any of them has another batch; endless
    datasets (`.repeat()`, with `steps_per_epoch`) avoid this.

    Args:
        dataset: Batches (x, y) or (x, y, sample_weight) of this worker.
        strategy: Strategy that the model was created in. Unless it is a MultiWorkerMirroredStrategy, `dataset` is
            returned as it is.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return dataset
    if dataset.cardinality() != tf.data.INFINITE_CARDINALITY:
        # The filter makes the cardinality unknown. Otherwise Keras would end a worker's epoch after as many batches as
        # this worker has.
        dataset = dataset.filter(lambda *_: True)
    return strategy.distribute_datasets_from_function(lambda _: dataset)


class _MultiWorker:
    """Replacements for methods of a model, which `enable` installs.

    Methods whose names end in `_step`, and the methods that they call, run in replica context, once per worker.
    """

    def __init__(self, model: keras.Model, stop: StopSignal | None, note: Callable[[str, Any], Any]) -> None:
        self.model, self.stop, self.note = model, stop, note
        self.strategy: tf.distribute.Strategy = model.distribute_strategy
        self.num_replicas: int = self.strategy.num_replicas_in_sync
        self.synchronizes_in_forward = False
        self.built_for: Any = None
        self.keras_train_step, self.keras_test_step = model.train_step, model.test_step
        self.keras_symbolic_build = type(model)._maybe_symbolic_build.__get__(model)
        if self.num_replicas > 1:
            self._refuse_what_would_differ()
        if model.jit_compile and type(model).train_step is keras.Model.train_step:
            self.keras_train_step = self._xla_train_step()

    def take_over(self) -> None:
        model = self.model
        model._maybe_symbolic_build = self._symbolic_build
        model.make_train_function = self._make_train_function
        model.make_test_function = self._make_test_function
        model.train_function = model.test_function = None
        for layer in model._flatten_layers():
            for generator in layer._seed_generators:
                _draw_by_replica(generator)

    def _refuse_what_would_differ(self) -> None:
        model = self.model
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
                if not layer.synchronized:
                    raise ValueError(
                        f"{layer.name} would normalise every worker's rows by themselves: make it "
                        "BatchNormalization(synchronized=True), or freeze it with trainable = False"
                    )
                self.synchronizes_in_forward = True
        for loss in tf.nest.flatten(model.loss):
            reduction = getattr(loss, "reduction", MEANS[0])
            if reduction not in MEANS:
                raise ValueError(
                    f"{loss} has reduction={reduction!r}, which is not a mean over rows and depends on how they are "
                    f"divided among the workers: take one of {MEANS}"
                )
        if model.jit_compile and self.synchronizes_in_forward:
            raise ValueError(
                "BatchNormalization(synchronized=True) communicates within the forward pass, which XLA cannot on every "
                "device: compile with jit_compile=False, or use another normalisation"
            )
        if model.jit_compile and type(model).train_step is not keras.Model.train_step:
            raise ValueError(
                f"{type(model).__name__} has a train_step of its own, of which the forward and backward pass cannot be "
                "told apart for XLA: override compute_loss instead, or compile with jit_compile=False"
            )

    # Methods that `fit` and `evaluate` call

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is None:
            self.keras_symbolic_build(data_batch=data_batch)
            return
        if "reset" in vars(iterator):  # already prepared, see the end of this method
            return
        if self.built_for is not self.model._loss_tracker:  # each `compile` creates a new one
            if getattr(iterator.data_adapter, "_shuffle", False):
                self._check_seeds()
            _, _, batches = next(iter(iterator))
            local = tf.nest.map_structure(
                lambda value: self.strategy.experimental_local_results(value)[0], next(batches)
            )
            with self.strategy.scope():
                self.model._symbolic_build(data_batch=local)
            self.built_for = self.model._loss_tracker
        cardinality = iterator._distributed_dataset.cardinality  # a property if distributed, else a method
        cardinality = cardinality() if callable(cardinality) else cardinality
        if cardinality == tf.data.UNKNOWN_CARDINALITY and not iterator.steps_per_epoch:
            iterator._interrupted_warning = lambda: None  # the end of the data is how the number is found
        if cardinality == tf.data.INFINITE_CARDINALITY:
            # `fit` passes the same iterator for every validation and resets it each time. Releasing an old tf.data
            # iterator can block a worker for up to a minute, while all others wait for it: the destructor waits for the
            # autotuner thread, which sleeps longer the longer it has run. An iterator over endless data is therefore
            # kept, and continues where it is.
            iterator.reset()
            iterator.reset = lambda: None

    def _make_train_function(self, force: bool = False) -> Callable[[Any], dict[str, tf.Tensor]]:
        if self.model.train_function is None or force:
            self.model.train_function = self._make_function(self._train_step)
        return self.model.train_function

    def _make_test_function(self, force: bool = False) -> Callable[[Any], dict[str, tf.Tensor]]:
        if self.model.test_function is None or force:
            self.model.test_function = self._make_function(self._test_step)
        return self.model.test_function

    def _make_function(self, step: Callable[[Any], Any]) -> Callable[[Any], dict[str, tf.Tensor]]:
        """Makes a function that runs `steps_per_execution` steps on an iterator and returns logs over all workers."""
        strategy, steps = self.strategy, self.model.steps_per_execution
        run = self.model._autoconvert_optionals(lambda data: strategy.run(step, args=(data,)))

        def next_step(iterator: Any, count: tf.Tensor, logs: Any) -> tuple[tf.Tensor, tf.Tensor, Any]:
            data = iterator.get_next_as_optional()
            more = data.has_value()
            return count + 1, more, tf.cond(more, lambda: run(data.get_value()), lambda: logs)

        def one_step(data: Any) -> dict[str, tf.Tensor]:
            return strategy.run(self._logs_step, args=(run(data),))

        def several_steps(iterator: Any) -> dict[str, tf.Tensor]:
            logs = run(iterator.get_next())
            if steps > 1:
                _, _, logs = tf.while_loop(
                    lambda count, more, logs: more & (count < steps),
                    lambda count, more, logs: next_step(iterator, count, logs),
                    (1, True, logs),
                )
            return strategy.run(self._logs_step, args=(logs,))

        if not self.model.run_eagerly:
            one_step = tf.function(one_step, reduce_retracing=True, autograph=False)
            several_steps = tf.function(several_steps, reduce_retracing=True, autograph=False)

        def function(iterator: Any) -> dict[str, tf.Tensor]:
            if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
                return several_steps(iterator)
            return one_step(next(iterator))  # called by `train_on_batch`

        return function

    def _check_seeds(self) -> None:
        """Raises a ValueError unless all workers have set the same global seed, and therefore shuffle arrays alike."""
        if self.num_replicas == 1:
            return
        seed = tf.compat.v1.get_seed(0)[0]  # draws no random number, since an operation seed is given
        seeds = self.strategy.gather(tf.constant([seed], tf.int64), axis=0).numpy().tolist()
        if seed == UNSET_SEED or len(set(seeds)) > 1:
            raise ValueError(
                "the workers would shuffle the rows differently, and train on some twice and on others never: call "
                "keras.utils.set_random_seed with the same seed on every worker, or give fit shuffle=False"
            )

    # Training step, test step, and the logs of both

    def _train_step(self, data: Any) -> dict[str, tf.Tensor]:
        data = self.note("data", data)
        rows = _rows(data)
        with self._gradients_of_global_batch(rows), self._metrics_by_rows(rows):
            return self.keras_train_step(data)

    def _test_step(self, data: Any) -> dict[str, tf.Tensor]:
        with self._metrics_by_rows(_rows(data)):
            return self.keras_test_step(data)

    def _xla_train_step(self) -> Callable[[Any], dict[str, tf.Tensor]]:
        """Returns the `train_step` of Keras, in which XLA compiles only the forward and backward pass."""
        model = self.model

        @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
        def forward_backward(x: Any, y: Any, sample_weight: Any) -> Any:
            with tf.GradientTape() as tape:
                y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
                loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
                scaled = model.optimizer.scale_loss(loss)
            return y_pred, loss, tape.gradient(scaled, model.trainable_weights)

        def train_step(data: Any) -> dict[str, tf.Tensor]:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            y_pred, loss, gradients = forward_backward(x, y, sample_weight)
            # Keras has divided the loss by the number of replicas, so that gradients only need to be summed.
            # The tracker gets the undivided loss.
            model._loss_tracker.update_state(loss * self.num_replicas, sample_weight=_rows(data))
            model.optimizer.apply_gradients(zip(gradients, model.trainable_weights, strict=True))
            return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

        return train_step

    @contextlib.contextmanager
    def _gradients_of_global_batch(self, rows: int | tf.Tensor) -> Iterator[None]:
        """Within this context each optimizer gets the gradient of the mean over the rows of all workers."""
        optimizer, extended = self.model.optimizer, self.strategy.extended
        weight = tf.cast(rows, tf.float32)
        scale_loss, apply, backend_apply = optimizer.scale_loss, optimizer.apply, _Optimizer._backend_apply_gradients
        if self.synchronizes_in_forward:
            # A worker's loss then depends on the rows of the others, so it must be weighted before differentiation.
            share = self.num_replicas * weight / self._sum(weight)
            weight = tf.constant(1.0)

        def scale_weighted_loss(loss: tf.Tensor) -> tf.Tensor:
            return scale_loss(loss * tf.cast(share, loss.dtype))

        def apply_summed(gradients: Any, trainable_variables: Any = None) -> None:
            variables = self.model.trainable_variables if trainable_variables is None else list(trainable_variables)
            apply(self._sum_gradients(gradients, variables, weight), trainable_variables)

        def update_here(inner: Any, gradients: Any, trainable_variables: Any) -> None:
            # All workers have the same gradients by now, so each can update its variables without communication.
            with _replaced(extended, "_use_merge_call", lambda: False):
                backend_apply(inner, gradients, trainable_variables)

        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(optimizer, "apply", apply_summed))
            if self.synchronizes_in_forward:
                stack.enter_context(_replaced(optimizer, "scale_loss", scale_weighted_loss))
            # Replaced on the class, because an optimizer may contain others.
            stack.enter_context(_replaced(_Optimizer, "_backend_apply_gradients", update_here))
            stack.enter_context(_replaced(_Optimizer, "_all_reduce_sum_gradients", lambda _, pairs: list(pairs)))
            yield

    def _sum_gradients(
        self, gradients: Any, variables: list[keras.Variable], weight: tf.Tensor
    ) -> list[tf.Tensor | None]:
        """Returns the means of the workers' gradients, dense and weighted by `weight`; also sums the stop requests."""
        gradients = list(gradients)
        # If the number of rows is unknown, TensorFlow loses the static shapes of some gradients.
        dense = [
            tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
            for gradient, variable in zip(gradients, variables, strict=True)
            if gradient is not None
        ]
        requested = self.stop.requested.read_value() if self.stop else tf.constant(0.0)
        if self.num_replicas == 1:
            means, requests = dense, requested
        else:
            means, requests = self._means_over_workers(dense, weight, requested)
        if self.stop:
            self.stop.sum_over_workers.assign(requests)
        remaining = iter(means)
        return [None if gradient is None else next(remaining) for gradient in gradients]

    def _means_over_workers(
        self, dense: list[tf.Tensor], weight: tf.Tensor, requested: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns the weighted means of `dense` and the sum of `requested`; reduces all of them as one vector."""
        # The gradients of an empty batch may be NaN.
        weighted = [tf.math.multiply_no_nan(tf.cast(gradient, tf.float32), weight) for gradient in dense]
        packed = self.note("reduce", _packed([*weighted, weight, requested]))
        packed = self.note("reduced", self._sum(packed))
        *sums, weights, requests = _unpacked(packed, [*weighted, weight, weight])
        factor = self.num_replicas / weights
        return [tf.cast(total * factor, gradient.dtype) for total, gradient in zip(sums, dense, strict=True)], requests

    @contextlib.contextmanager
    def _metrics_by_rows(self, rows: int | tf.Tensor) -> Iterator[None]:
        """Within this context the loss of each output is weighted by rows, and an empty batch changes no metric."""
        compile_loss = self.model._compile_loss
        variables = self._metric_variables()
        before = [tf.identity(variable.value) for variable in variables]
        with contextlib.ExitStack() as stack:
            for tracker in compile_loss.metrics if compile_loss else []:
                stack.enter_context(_replaced(tracker, "update_state", _weighted_by(rows, tracker.update_state)))
            yield
        if not isinstance(rows, int):
            for variable, value in zip(variables, before, strict=True):
                variable.assign(tf.where(rows > 0, variable.value, value))  # the mean over zero rows is NaN

    def _logs_step(self, logs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns the metrics over all workers; the mean of all logs if a custom `train_step` returns others too."""
        variables = self._metric_variables()
        values = iter(_unpacked(self._sum(_packed([v.value for v in variables])), variables))
        results = _flat(
            {
                metric.name: metric.stateless_result([next(values) for _ in metric.variables])
                for metric in self.model.metrics
            }
        )
        logs = _flat(logs)
        if set(results) == set(logs):
            return results
        return {name: self._sum(value) / self.num_replicas for name, value in logs.items()}

    def _metric_variables(self) -> list[keras.Variable]:
        return [variable for metric in self.model.metrics for variable in metric.variables]

    def _sum(self, value: tf.Tensor) -> tf.Tensor:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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


def _rows(data: Any) -> int | tf.Tensor:
    """Number of rows in a batch: an int if it is known statically, otherwise a tensor."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    first = next(value for value in tf.nest.flatten(x) if value is not None)
    return first.shape[0] or tf.shape(first)[0]


def _flat(logs: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Flattens logs: a metric that is a dict of values is replaced by its entries."""
    return {
        inner: item
        for name, value in logs.items()
        for inner, item in (value if isinstance(value, dict) else {name: value}).items()
    }


def _weighted_by(rows: int | tf.Tensor, update_state: Callable[..., None]) -> Callable[..., None]:
    """Wraps `update_state` of a loss tracker, so that `rows` is the weight of each value."""
    return lambda value, sample_weight=None: update_state(value, sample_weight=rows)


def _packed(values: list[Any]) -> tf.Tensor:
    """Concatenates tensors into one float32 vector."""
    return tf.concat([tf.reshape(tf.cast(value, tf.float32), [-1]) for value in values], axis=0)


def _unpacked(packed: tf.Tensor, like: list[Any]) -> list[tf.Tensor]:
    """Splits a vector made by `_packed` into tensors with the shapes and dtypes of `like`."""
    parts = tf.split(packed, [value.shape.num_elements() for value in like])
    return [tf.cast(tf.reshape(part, value.shape), value.dtype) for part, value in zip(parts, like, strict=True)]


def _draw_by_replica(generator: keras.random.SeedGenerator) -> None:
    """Makes a generator draw different numbers on each replica; its state, which is saved, stays equal on all."""
    if "next" in vars(generator):
        return
    draw = generator.next

    def next_of_replica(ordered: bool = True) -> tf.Tensor:
        seed = draw(ordered)
        replica = tf.distribute.get_replica_context()
        if replica is None:
            return seed
        return seed + tf.cast(replica.replica_id_in_sync_group, seed.dtype) * tf.constant([SEED_STRIDE, 0], seed.dtype)

    generator.next = next_of_replica
