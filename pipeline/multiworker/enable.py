"""`enable`: the methods of a model that `fit`, `evaluate` and `predict` use on several workers."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from .compressed import BFloat16Replica
from .data import Share, rows_of, shares, with_a_row
from .exchange import of_all_workers
from .first_step import FirstStep, is_built
from .functions import StepFunction, predict_function, shares_of_batch
from .guard import guard_of
from .iterators import BackgroundReleased, prepare
from .keras_internals import EpochIterator, adopt, check_keras, iterator_of_validations, local_spec, replaced
from .metric_results import watch_results
from .metrics import DIFFERENT_BATCHES, Logs, flat
from .one_replica import Note, OneReplica
from .refusals import refuse_stateful_layers, refuse_strategy, refuse_training
from .stop_signal import StopSignal
from .tf_config import cluster
from .writing_callbacks import WRITE, written_by_first
from .xla_step import xla_train_step

CALLS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch")


def enable(
    model: keras.Model,
    stop: StopSignal | None = None,
    note: Note | None = None,
    *,
    check: bool = True,
    batch_norm: str | None = None,
    gradient_dtype: str = "float32",
) -> None:
    """Makes `fit`, `evaluate` and `predict` of a model work under the strategy that it was created in.

    The loss, the metrics, the gradients and therefore the weights are those of the global batch, whatever the number of
    workers and however many rows of a batch each of them has. Gradients are clipped, accumulated and checked for
    infinities after they have been summed over the workers. Random layers draw different numbers on each worker. With
    `compile(jit_compile=True)`, XLA compiles the forward and backward pass and the optimizer's update; the collectives
    between them, which XLA does not support on a CPU, stay outside.

    What is found to differ from one process is refused in the first step: the workers' batches are compared, and a few
    rows of the first batch are computed both as one process would and in uneven parts on the workers.

    The methods are replaced on the instance, so neither the class nor a saved `.keras` file changes; a loaded model has
    to be enabled again. Another `compile` needs no other `enable`. A model that was created without a strategy trains
    as before, except that sparse gradients are made dense there too.

    Args:
        model: Model created inside `strategy.scope()`.
        stop: If given, its requests are exchanged between the workers in each training step.
        note: Called in each training step, outside what XLA compiles, with the name of a moment and the tensors that
            are computed by then: "data" with the batch; with several workers also "reduce" before gradients are summed
            over them and "reduced" afterwards. The step continues with the tensors that `note` returns, so that
            operations that measure can be placed before the operations that follow.
        check: Whether the first training step and the first test step are computed in both ways and compared.
        batch_norm: "synchronize" sets `synchronized` on all BatchNormalization layers of the model, which is what a
            model of `keras.applications` needs. None leaves them as they are.
        gradient_dtype: "bfloat16" halves what the workers send of the gradients, and changes the result by rounding:
            `compressed.py`. The model must be built.

    Raises:
        RuntimeError: if the installed Keras lacks a private name that this package relies on.
        ValueError: if `batch_norm` is neither None nor "synchronize", if the model was created in another strategy than
            MultiWorkerMirroredStrategy, in none although TF_CONFIG has several workers, or if a worker has several
            devices. The calls of the model raise it if a part of the model or the data would differ on several workers;
            the message contains the part and the remedy.
    """
    check_keras()
    if batch_norm not in (None, "synchronize"):
        raise ValueError(f"batch_norm={batch_norm!r}: take None or 'synchronize'")
    if gradient_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"gradient_dtype={gradient_dtype!r}: take 'float32' or 'bfloat16'")
    if batch_norm:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync > 1:
        refuse_strategy(strategy)
    elif (environment := cluster()).own and len(environment.workers) > 1:
        raise ValueError(
            "the model was made outside of the scope of the strategy, so that each worker of TF_CONFIG would train a "
            "model of its own: make it, or load it, and compile it within `with strategy.scope():` of a "
            "MultiWorkerMirroredStrategy. A model that this process alone uses needs no multiworker.enable"
        )
    _MultiWorker(model, stop, note or (lambda moment, tensors: tensors), check, gradient_dtype).take_over()


class _MultiWorker:
    """Replacements for methods of a model, which `enable` installs.

    Methods whose names end in `_step` run in replica context, once per replica.
    """

    def __init__(
        self, model: keras.Model, stop: StopSignal | None, note: Note, check: bool, gradient_dtype: str
    ) -> None:
        self.model, self.note = model, note
        self.strategy: tf.distribute.Strategy = model.distribute_strategy
        self.replica = OneReplica(self.strategy, stop, note)
        if gradient_dtype == "bfloat16" and self.replica.num_replicas > 1:
            self.replica = BFloat16Replica(model, self.strategy, stop, note)
        self.several = self.replica.num_replicas > 1
        self.logs = Logs(model, self.replica)
        self.guard = guard_of(self.strategy)
        self.first_step = FirstStep(model, self.replica, self.logs, check) if self.several else None
        self.keras_calls = {name: getattr(type(model), name).__get__(model) for name in CALLS}
        self.keras_symbolic_build = type(model)._maybe_symbolic_build.__get__(model)

    def take_over(self) -> None:
        model = self.model
        model._maybe_symbolic_build = self._symbolic_build
        model.make_train_function = self._make_train_function
        model.make_test_function = self._make_test_function
        model.train_function = model.test_function = model.predict_function = None
        if not self.several:
            return
        watch_results(model, self.guard)
        model.make_predict_function = self._make_predict_function
        # The logs of a step are those of all workers already.
        model._get_metrics_result_or_logs = lambda logs: logs
        for name in CALLS:
            setattr(model, name, self._together(name, self.keras_calls[name]))
        model.predict_on_batch = self._together("predict_on_batch", self._predict_on_batch)

    def _together(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Lets Keras divide data by slices in a call that all workers make.

        TensorFlow would divide files, or other units of the dataset.
        """

        def divided(dataset: tf.data.Dataset, options: Any = None) -> Any:
            return shares(dataset, self.strategy)

        def batches(iterator: Any) -> BackgroundReleased:
            return BackgroundReleased(iterator._distributed_dataset)

        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            with (
                self.guard.call(name),
                replaced(self.strategy, "experimental_distribute_dataset", divided),
                replaced(EpochIterator, "_get_iterator", batches),
            ):
                refuse_stateful_layers(self.model)
                if self.first_step and not name.endswith("_on_batch"):
                    self.first_step.compare_weights(self.guard)
                if name == "fit":
                    return self._fit(inspect.signature(call).bind(*args, **kwargs))
                with self.guard.waiting_for_batches() if name == "predict" else contextlib.nullcontext():
                    return call(*args, **kwargs)

        return called

    def _fit(self, given: inspect.BoundArguments) -> keras.callbacks.History:
        passed: Any = given.arguments.get("callbacks")
        is_list_of_keras = isinstance(passed, keras.callbacks.CallbackList)
        callbacks = passed.callbacks if is_list_of_keras else passed
        callbacks = callbacks if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        if not any(isinstance(callback, WRITE) for callback in callbacks):
            return self.keras_calls["fit"](*given.args, **given.kwargs)
        with contextlib.ExitStack() as stack:
            own = stack.enter_context(written_by_first(list(callbacks), self.model, self.guard.rank))
            if is_list_of_keras:
                stack.enter_context(replaced(passed, "callbacks", own))
            else:
                given.arguments["callbacks"] = own
            history = self.keras_calls["fit"](*given.args, **given.kwargs)
        with self.guard.waiting():  # no worker returns before everything is written
            of_all_workers(self.strategy, self.guard.rank)
        return history

    def _predict_on_batch(self, x: Any) -> Any:
        self.model.make_predict_function()
        outputs = self.model.predict_function([shares_of_batch((x,), self.strategy)])
        return tf.nest.map_structure(lambda value: value.numpy(), outputs)

    # Methods that `fit`, `evaluate` and `predict` call

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is None:
            self._build(data_batch)
            return
        if vars(iterator).get("reset"):  # it is kept, and was prepared for an earlier validation
            return
        distributed = iterator._distributed_dataset
        spec = local_spec(distributed.element_spec)
        # Keras would take a batch from the iterator, and with it the batch from whatever the iterator reads.
        self._build(spec.data if isinstance(spec, Share) else spec)
        if self.several:
            self._refuse_other_numbers(iterator.num_batches)
        prepare(iterator, self.strategy, is_of_validations=iterator is iterator_of_validations(self.model))

    def _refuse_other_numbers(self, batches: int | None) -> None:
        """Raises a ValueError if Keras would end an epoch after other numbers of batches on other workers."""
        with self.guard.waiting():
            numbers = of_all_workers(self.strategy, -1 if batches is None else batches)
        if len(set(numbers)) > 1:
            raise ValueError(f"{DIFFERENT_BATCHES} (batches of an epoch: {numbers})")

    def _build(self, batch: Any) -> None:
        """Builds the model, its losses, metrics and optimizer, which have to be created outside of a step."""
        model = self.model

        def symbolic(value: Any) -> Any:
            if not hasattr(value, "shape"):
                return None
            return keras.KerasTensor(tuple(value.shape), keras.backend.standardize_dtype(value.dtype))

        if model.optimizer is not None and self.several:
            adopt(model.optimizer, self.strategy)
        own_step = type(model).train_step is not keras.Model.train_step
        if own_step and not is_built(model):
            return  # by its step, because its `call` may take something else than the batch
        # A single process needs none of this, but callbacks then find the same variables before the first step.
        may_fail = own_step or not self.several
        with contextlib.suppress(Exception) if may_fail else contextlib.nullcontext(), self.strategy.scope():
            model._symbolic_build(data_batch=tf.nest.map_structure(symbolic, batch))

    def _make_train_function(self, force: bool = False) -> Callable[[Any], dict[str, tf.Tensor]]:
        if self.model.train_function is None or force:
            if self.several:
                refuse_training(self.model)
            if isinstance(self.replica, BFloat16Replica):
                self.replica.begin_training()
            step = self.model.train_step
            if self.model.jit_compile and type(self.model).train_step is keras.Model.train_step:
                step = xla_train_step(self.model, self.replica)
            self.model.train_function = self._step_function(step, training=True)
        return self.model.train_function

    def _make_test_function(self, force: bool = False) -> Callable[[Any], dict[str, tf.Tensor]]:
        if self.model.test_function is None or force:
            self.model.test_function = self._step_function(self.model.test_step, training=False)
        return self.model.test_function

    def _step_function(self, keras_step: Callable[[Any], Any], training: bool) -> Callable[[Any], Any]:
        def step(data: Any) -> Any:
            data = self.note("data", data) if training else data
            return self._step(keras_step, data)

        return StepFunction(self.model, self.replica, self.logs, step, self.first_step, self.guard)

    def _make_predict_function(self, force: bool = False) -> Callable[[Any], Any]:
        if self.model.predict_function is None or force:
            self.model.predict_function = predict_function(self.model, self.replica, self.logs, self.guard)
        return self.model.predict_function

    def _step(self, keras_step: Callable[[Any], Any], data: Any) -> tuple[dict[str, Any], Any]:
        """One replica's part of a step; returns its logs and its number of rows."""
        if not self.several:
            with self.replica.batch(1, None):
                return keras_step(data), 1
        if isinstance(data, Share):
            self.logs.add_batch(data.fingerprint)
            rows, total, data = data.rows, data.total, with_a_row(data.data, rows_of(data.data))
        else:
            rows, total = rows_of(data), None
            data = with_a_row(data, rows)
        with self.replica.batch(rows, total), self.logs.of_step(rows) as logs:
            logs.update(flat(keras_step(data)))
        self.replica.refuse()
        return {name: tf.convert_to_tensor(value) for name, value in logs.items()}, rows
