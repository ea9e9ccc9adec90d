"""What Keras sees within a step on several workers: a single replica, whose sums are those of all workers."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from .keras_internals import (
    Optimizer,
    adopt,
    loss_module,
    nn_module,
    optimizer_classes,
    owner_of,
    replaced,
)
from .stop_signal import StopSignal
from .vectors import packed, unpacked, widest

Note = Callable[[str, Any], Any]
"""Called with the name of a moment and tensors; returns the tensors with which the step continues."""

# Loss reductions that are means over the rows of a batch. Only for these is it correct to weight workers by their rows.
MEANS = ("sum_over_batch_size", "mean")
WITHIN_XLA = "communicates within the forward pass, which XLA cannot on every device: compile with jit_compile=False"
# Odd and large, so that generators with neighbouring seeds do not draw each other's numbers on other workers.
SEED_STRIDE = 0x9E3779B1


class OneReplica:
    """Lets the code of a step run as if its process were the only one.

    A replica computes the loss that one process would compute on its rows. Where the replicas' results meet, they are
    put together by the number of rows: gradients when they are given to an optimizer, the moments of synchronized
    BatchNormalization, the share of valid entries under a mask, and metrics that are given a statistic of the batch.

    Args:
        strategy: Strategy of the model.
        stop: If given, its requests are summed together with the gradients.
        note: Called before ("reduce") and after ("reduced") gradients are summed.

    Attributes:
        alone: Whether sums leave out the other workers, so that this worker computes what one process would.
        recorded: If a list, optimizers add the gradients to it instead of applying them.
        within_xla: Whether XLA compiles the current operations, where workers cannot communicate.
        around_update: Makes of an optimizer's `apply` what is called with the gradients once they are summed.
        refusals: Messages about parts that would differ on several workers, found by running them.
    """

    def __init__(self, strategy: tf.distribute.Strategy, stop: StopSignal | None, note: Note) -> None:
        self.strategy, self.stop, self.note = strategy, stop, note
        self.num_replicas: int = strategy.num_replicas_in_sync
        self.alone = self.within_xla = False
        self.around_update: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda apply: apply
        self.recorded: list[tuple[str, tf.Tensor]] | None = None
        self.refusals: list[str] = []
        self._of_replica = threading.local()  # each replica of a process runs in a thread of its own

    @contextlib.contextmanager
    def batch(self, rows: int | tf.Tensor, total: tf.Tensor | None) -> Iterator[None]:
        """Tells how many rows this replica has within this context, and how many all have, if that is known."""
        own = self._of_replica
        own.rows, own.total, own.applying = rows, total, False
        try:
            yield
        finally:
            own.rows = own.total = None

    @contextlib.contextmanager
    def view(self) -> Iterator[None]:
        """Within this context Keras and TensorFlow act as with one replica. Entered in cross-replica context."""
        with contextlib.ExitStack() as stack:

            def replace(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(replaced(owner, name, value))

            for owner in list(optimizer_classes()):
                replace(owner, "apply", self._summing(owner.apply))
            replace(keras.random.SeedGenerator, "next", _drawing_by_replica(keras.random.SeedGenerator.next))
            if self.num_replicas > 1:
                self._replace_for_several(replace)
            yield

    def _replace_for_several(self, replace: Callable[[Any, str, Any], None]) -> None:
        strategy, update = self.strategy, Optimizer._backend_apply_gradients
        owner = owner_of(type(strategy), "num_replicas_in_sync")
        number = vars(owner)["num_replicas_in_sync"]
        replace(owner, "num_replicas_in_sync", property(lambda s: 1 if s is strategy else number.fget(s)))
        replace(loss_module, "scale_loss_for_distribution", lambda value: value)
        replace(loss_module, "unscale_loss_for_distribution", lambda value: value)
        replace(loss_module, "apply_mask", self._masking(loss_module.apply_mask))
        replace(keras.metrics.Mean, "update_state", self._updating_mean(keras.metrics.Mean.update_state))
        replace(nn_module, "_compute_moments_sync", self._moments)
        replace(
            keras.layers.BatchNormalization, "_moments", self._normalizing(keras.layers.BatchNormalization._moments)
        )

        def update_here(optimizer: Any, grads: Any, trainable_variables: Any) -> None:
            # All workers have the same gradients by now, so each can update its variables without communication.
            with replaced(strategy.extended, "_use_merge_call", lambda: False):
                update(optimizer, grads, trainable_variables)

        replace(Optimizer, "_backend_apply_gradients", update_here)
        replace(Optimizer, "_all_reduce_sum_gradients", lambda _, pairs: list(pairs))
        context = owner_of(tf.distribute.ReplicaContext, "all_reduce")
        all_reduce = context.all_reduce

        def reduce_unless_alone(replica: Any, reduce_op: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return value if self.alone else all_reduce(replica, reduce_op, value, *args, **kwargs)

        replace(context, "all_reduce", reduce_unless_alone)

    def refuse(self) -> None:
        """Raises a ValueError if the operations that ran last have a part that would differ on several workers."""
        if self.refusals:
            message, self.refusals = self.refusals[0], []
            raise ValueError(message)

    # Sums over the replicas

    def sum(self, value: Any) -> Any:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)

    def _share(self) -> tf.Tensor:
        """The share that this replica's rows have of those of all replicas."""
        own = self._of_replica
        rows = tf.cast(own.rows, tf.float32)
        return rows / (self.sum(rows) if own.total is None else tf.cast(own.total, tf.float32))

    def _summing(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Makes an optimizer sum the gradients; optimizers that it contains get the sums."""
        own = self._of_replica

        def apply_summed(optimizer: Any, grads: Any, trainable_variables: Any = None) -> Any:
            if self.num_replicas > 1:
                adopt(optimizer, self.strategy)
            if getattr(own, "rows", None) is None or own.applying:
                return apply(optimizer, grads, trainable_variables)
            grads = list(grads)
            variables = [None] * len(grads) if trainable_variables is None else list(trainable_variables)
            summed = self._sum_gradients(grads, variables)
            if self.recorded is not None:
                for index, (gradient, variable) in enumerate(zip(summed, variables, strict=True)):
                    if gradient is not None:
                        self.recorded.append((getattr(variable, "path", f"variable {index}"), gradient))
                return None
            own.applying = True
            try:
                update = self.around_update(apply)
                return update(optimizer, summed, None if trainable_variables is None else variables)
            finally:
                own.applying = False

        return apply_summed

    def _sum_gradients(self, gradients: list[Any], variables: list[Any]) -> list[tf.Tensor | None]:
        """Returns the means of the replicas' gradients by their rows, dense; also sums the requests to stop."""
        # If the number of rows is unknown, TensorFlow loses the static shapes of some gradients.
        dense = [
            tf.ensure_shape(tf.convert_to_tensor(gradient), None if variable is None else variable.shape)
            for gradient, variable in zip(gradients, variables, strict=True)
            if gradient is not None
        ]
        requested = self.stop.requested.read_value() if self.stop else tf.constant(0.0)
        if self.num_replicas == 1:
            means, requests = dense, requested
        else:
            means, requests = self._means_over_replicas(dense, requested)
        if self.stop:
            self.stop.sum_over_workers.assign(requests)
        remaining = iter(means)
        return [None if gradient is None else next(remaining) for gradient in gradients]

    def _means_over_replicas(self, dense: list[tf.Tensor], requested: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns the means of `dense` by rows and the sum of `requested`; sums all of them as one vector."""
        dtype = widest(dense)
        weight = tf.cast(self._of_replica.rows, dtype)
        # The gradients of a replica without rows may be NaN.
        weighted = [tf.math.multiply_no_nan(tf.cast(gradient, dtype), weight) for gradient in dense]
        vector = self.note("reduce", packed([*weighted, weight, requested]))
        vector = self.note("reduced", self.sum(vector))
        *sums, weights, requests = unpacked(vector, [*weighted, weight, weight])
        factor = 1.0 / weights
        means = [tf.cast(total * factor, gradient.dtype) for total, gradient in zip(sums, dense, strict=True)]
        return means, tf.cast(requests, requested.dtype)

    # What depends on other rows of the batch

    def _updating_mean(self, update_state: Callable[..., Any]) -> Callable[..., Any]:
        """Weights a statistic of the batch by the replica's share of rows, so that the weights add up to one."""

        def update(metric: keras.metrics.Mean, values: Any, sample_weight: Any = None) -> Any:
            own = self._of_replica
            if (
                sample_weight is None
                and not len(getattr(values, "shape", ()))
                and getattr(own, "rows", None) is not None
            ):
                sample_weight = self._share()
            return update_state(metric, values, sample_weight)

        return update

    def _masking(self, apply_mask: Callable[..., Any]) -> Callable[..., Any]:
        """Rescales a masked mean by the valid entries in a row: those of this replica over those of all."""

        def apply(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
            weights = apply_mask(sample_weight, mask, dtype, reduction)
            own = self._of_replica
            if mask is None or reduction not in MEANS or getattr(own, "rows", None) is None:
                return weights
            if self.within_xla:
                self.refusals.append(f"a loss under a mask, or with ignore_class, {WITHIN_XLA}")
                return weights
            # By rows, as gradients are weighted: a row has more entries on a worker that pads to a greater length.
            rows = tf.cast(own.rows, tf.float32)
            here = tf.stop_gradient(tf.stack([rows, tf.reduce_sum(tf.cast(mask, tf.float32))]))
            of_all = self.sum(tf.where(rows > 0, here, 0.0))
            factor = tf.math.divide_no_nan(here[1] * of_all[0], here[0] * of_all[1])
            return weights * tf.cast(factor, weights.dtype)

        return apply

    def _normalizing(self, moments: Callable[..., Any]) -> Callable[..., Any]:
        def of_layer(layer: keras.layers.BatchNormalization, inputs: Any, mask: Any) -> Any:
            if not layer.synchronized:
                self.refusals.append(
                    f"{layer.name} would normalise every worker's rows by themselves: make it "
                    "BatchNormalization(synchronized=True), freeze it with trainable = False, or let "
                    'enable(model, batch_norm="synchronize") synchronize those of a model that was made elsewhere'
                )
            if mask is None or not layer.synchronized or self.within_xla:
                return moments(layer, inputs, mask)
            axes = layer._reduction_axes
            valid = tf.cast(tf.broadcast_to(tf.cast(mask, tf.bool)[..., tf.newaxis], tf.shape(inputs)), tf.bool)
            epsilon = keras.config.epsilon()
            total, count = self._sums(
                [
                    tf.reduce_sum(tf.where(valid, inputs, 0), axes, keepdims=True),
                    tf.reduce_sum(tf.cast(valid, inputs.dtype), axes, keepdims=True),
                ]
            )
            mean = total / (count + epsilon)
            squares = tf.square(tf.where(valid, inputs - mean, 0))
            (squared,) = self._sums([tf.reduce_sum(squares, axes, keepdims=True)])
            return tf.squeeze(mean), tf.squeeze(squared / (count + epsilon))

        return of_layer

    def _moments(self, x: tf.Tensor, axes: Any, keepdims: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and variance of the rows of all replicas."""
        if getattr(self._of_replica, "rows", None) is None:
            return tf.nn.moments(x, axes, keepdims=keepdims)
        if self.within_xla:
            self.refusals.append(f"BatchNormalization(synchronized=True) {WITHIN_XLA}, or use another normalisation")
            return tf.nn.moments(x, axes, keepdims=keepdims)
        # Deviations from the mean of these rows, so that a variance that is small beside the square of the mean is as
        # exact as in one process; what is summed are a few numbers for each channel, in float64.
        here, variance = (tf.cast(value, tf.float64) for value in tf.nn.moments(x, axes, keepdims=True))
        count = tf.cast(tf.size(x) / tf.size(here), tf.float64)
        total, squared, count = self._sums([here * count, (variance + tf.square(here)) * count, count])
        mean = tf.math.divide_no_nan(total, count)
        variance = tf.maximum(tf.math.divide_no_nan(squared, count) - tf.square(mean), 0.0)
        mean, variance = tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)
        return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))

    def _sums(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Sums over the replicas that a forward pass can contain.

        The gradient of a replica's loss is weighted by its rows only after the backward pass. The backward pass through
        a sum therefore weights the gradients of all replicas by their rows, and divides by the rows of its own.
        """
        weight = tf.cast(self._of_replica.rows, widest(values))

        @tf.custom_gradient
        def summed(vector: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return tf.math.divide_no_nan(self.sum(tf.math.multiply_no_nan(upstream, weight)), weight)

            return self.sum(tf.where(weight > 0, vector, tf.zeros_like(vector))), gradient

        return unpacked(summed(packed(values)), values)


def _drawing_by_replica(draw: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Makes generators draw different numbers on each replica; their state, which is saved, stays equal on all."""

    def next_of_replica(generator: keras.random.SeedGenerator, ordered: bool = True) -> tf.Tensor:
        seed = draw(generator, ordered)
        replica = tf.distribute.get_replica_context()
        if replica is None:
            return seed
        return seed + tf.cast(replica.replica_id_in_sync_group, seed.dtype) * tf.constant([SEED_STRIDE, 0], seed.dtype)

    return next_of_replica
