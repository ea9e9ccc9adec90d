"""`train_step` and `test_step` of one's own"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import (
    BATCH,
    CROSSENTROPY,
    DIFFERS,
    FIT,
    ROWS,
    Result,
    T,
    Worker,
    X,
    Y,
    case,
    fitted,
)
from keras import ops


class Guided(keras.Model):
    """A small model of which the guide "Customizing what happens in fit()" overrides the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(8, activation="tanh")
        self.last = keras.layers.Dense(1)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.last(self.hidden(x))


class SimpleStep(Guided):
    """The first example of the guide."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        trainable_vars = self.trainable_variables
        gradients = tape.gradient(loss, trainable_vars)
        self.optimizer.apply(gradients, trainable_vars)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


class LowLevelStep(Guided):
    """The guide's example without `compile(loss=...)`: a loss and metrics of one's own."""

    def __init__(self, loss: Any = None) -> None:
        super().__init__()
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
        self.loss_fn = loss or keras.losses.MeanSquaredError()

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.loss_fn(y, y_pred)
        trainable_vars = self.trainable_variables
        gradients = tape.gradient(loss, trainable_vars)
        self.optimizer.apply(gradients, trainable_vars)
        self.loss_tracker.update_state(loss)
        self.mae_metric.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}

    @property
    def metrics(self) -> list[keras.Metric]:
        return [self.loss_tracker, self.mae_metric]


@case(workers=(2, 3), slow=False)
def guides_first_train_step(worker: Worker) -> Result:
    """the guide's first `train_step`, with `compute_loss` and a loop over the metrics"""
    return fitted(worker.compiled(SimpleStep, "mse", metrics=["mae"]), X, T)


@case()
def guides_low_level_train_step(worker: Worker) -> Result:
    """the guide's `train_step` with a loss object and metrics of its own"""
    return fitted(worker.compiled(LowLevelStep), X, T)


@case()
def scalar_mean_in_train_step(worker: Worker) -> Result:
    """a `train_step` whose loss is a bare `ops.mean`"""
    return fitted(worker.compiled(lambda: LowLevelStep(lambda y, p: ops.mean(ops.square(y - p)))), X, T)


@case(f"{DIFFERS}gradient")
def vector_of_losses_in_train_step(worker: Worker) -> Result:
    """a `train_step` that differentiates a vector of losses, thus their sum"""
    sgd = lambda: keras.optimizers.SGD(0.01)  # noqa: E731
    return fitted(worker.compiled(lambda: LowLevelStep(keras.losses.mean_squared_error), optimizer=sgd), X, T)


@case()
def guides_train_step_with_sample_weights(worker: Worker) -> Result:
    """the guide's `train_step` with sample weights"""

    class Weighted(Guided):
        def train_step(self, data: Any) -> Any:
            if len(data) == 3:
                x, y, sample_weight = data
            else:
                sample_weight = None
                x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
            trainable_vars = self.trainable_variables
            gradients = tape.gradient(loss, trainable_vars)
            self.optimizer.apply(gradients, trainable_vars)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred, sample_weight=sample_weight)
            return {m.name: m.result() for m in self.metrics}

    weights = np.linspace(0.1, 2, ROWS, dtype=np.float32)
    return fitted(worker.compiled(Weighted, "mse", metrics=["mae"]), X, T, sample_weight=weights)


@case()
def guides_test_step(worker: Worker) -> Result:
    """the guide's `test_step`, in `fit` and in `evaluate`"""

    class Tested(Guided):
        def test_step(self, data: Any) -> Any:
            x, y = data
            y_pred = self(x, training=False)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    model = worker.compiled(Tested, "mse", metrics=["mae"])
    result = fitted(model, X, T, validation_data=(X[:37], T[:37]))
    return result | {"evaluated": model.evaluate(X, T, batch_size=BATCH, verbose=0)}


@case()
def two_optimizers_by_parts(worker: Worker) -> Result:
    """a `train_step` that calls `apply_gradients` of two optimizers that it owns"""

    class Halves(Guided):
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.optimizers.SGD(0.1, momentum=0.9)
            self.second = keras.optimizers.Adam(0.01)

        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            for optimizer, layer in ((self.first, self.hidden), (self.second, self.last)):
                weights = layer.trainable_weights
                optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return {"step_loss": loss}

    return fitted(worker.compiled(Halves, "mse"), X, T)


@case()
def train_step_of_the_class_extended(worker: Worker) -> Result:
    """a `train_step` that calls `super().train_step` and adds to the logs"""

    class Extended(Guided):
        def train_step(self, data: Any) -> Any:
            x, y = data
            logs = super().train_step(((x + 0.1), y))
            return logs | {"largest_weight": ops.max(ops.abs(self.last.kernel))}

    return fitted(worker.compiled(Extended, "mse", metrics=["mae"]), X, T)


@case()
def steps_counted_in_a_plain_variable(worker: Worker) -> Result:
    """a `train_step` that counts its steps in a `tf.Variable`, which weights the loss"""

    class Annealed(Guided):
        def __init__(self) -> None:
            super().__init__()
            first = tf.VariableAggregation.ONLY_FIRST_REPLICA
            self.steps = tf.Variable(0.0, trainable=False, aggregation=first)

        def train_step(self, data: Any) -> Any:
            self.steps.assign_add(1.0)
            return super().train_step(data)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * tf.exp(-0.1 * self.steps)

    model = worker.compiled(Annealed, "mse", metrics=["mae"])
    return fitted(model, X, T) | {"steps": model.steps.numpy()}


class InPercent(Guided):
    """A model whose steps log a number that is computed from the result of a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.near = keras.metrics.MeanMetricWrapper(lambda y, p: ops.abs(y - p)[:, 0] < 1, name="near")

    def train_step(self, data: Any) -> Any:
        x, y = data
        logs = super().train_step(data)
        self.near.update_state(y, self(x))
        return logs | {"near_percent": 100 * self.near.result()}

    def test_step(self, data: Any) -> Any:
        x, y = data
        self.near.update_state(y, self(x))
        return {"near_percent": 100 * self.near.result()}


@case("the log 'near_percent' is computed from the result of a metric.*callback")
def log_from_the_result_of_a_metric(worker: Worker) -> Result:
    """a `train_step` that adds 100 times the result of a metric to the logs"""
    return fitted(worker.compiled(InPercent, "mse"), X, T)


@case("the log 'near_percent' is computed from the result of a metric.*callback")
def log_from_the_result_of_a_metric_in_a_test_step(worker: Worker) -> Result:
    """the same in a `test_step`, without the check"""
    model = worker.compiled(InPercent, "mse", enable={"check": False})
    return {"evaluated": model.evaluate(X, T, batch_size=BATCH, verbose=0)}


@case("the log 'near' is computed from the result of a metric.*without a tf.function")
def test_step_that_is_a_function(worker: Worker) -> Result:
    """a `test_step` that is decorated with `tf.function`, and returns the result of a metric"""

    class Decorated(InPercent):
        @tf.function
        def test_step(self, data: Any) -> Any:
            super().test_step(data)
            return {"near": self.near.result()}

    return {"evaluated": worker.compiled(Decorated, "mse").evaluate(X, T, batch_size=BATCH, verbose=0)}


@case(f"{DIFFERS}log loss")
def own_step_that_normalises_by_the_batch(worker: Worker) -> Result:
    """a `train_step` that divides by the standard deviation of the batch"""

    class Scaled(Guided):
        def train_step(self, data: Any) -> Any:
            x, y = data
            return super().train_step((x / (ops.std(x, axis=0) + 0.1), y))

    return fitted(worker.compiled(Scaled, "mse", metrics=["mae"]), X, T)


@case()
def compiled_again(worker: Worker) -> Result:
    """another `compile` with another loss between two calls of `fit`, without another `enable`"""
    model = worker.compiled(Guided, "mse", metrics=["mae"])
    model.fit(X, T, **FIT)
    with worker.strategy.scope():
        model.compile(keras.optimizers.SGD(0.05), lambda y, p: ops.mean(ops.abs(y - p)), metrics=["mse"])
    return fitted(model, X, T)


@case()
def saved_and_loaded(worker: Worker) -> Result:
    """a model that is saved, loaded in the scope, and enabled"""
    file = worker.folder / f"{worker.rank}.keras"
    make = lambda: keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, "softmax")])  # noqa: E731
    model = worker.compiled(make, CROSSENTROPY, lambda: keras.optimizers.SGD(0.1, momentum=0.9))
    model.fit(X, Y, **FIT)
    model.save(file)
    with worker.strategy.scope():
        loaded = keras.saving.load_model(file)
    return fitted(worker.enable(loaded), X, Y)
