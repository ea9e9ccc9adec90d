"""Metrics"""

from typing import Any

import keras
import numpy as np
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
    classifier,
    dataset,
    fitted,
    outcome,
    regressor,
)
from keras import ops

ONE_HOT = np.eye(2, dtype=np.float32)[Y]


@case(slow=False)
def metrics_made_before_the_scope(worker: Worker) -> Result:
    """metrics that are made before the scope of the strategy, and EarlyStopping on one of them"""
    metrics = [keras.metrics.TruePositives(name="tp"), keras.metrics.AUC(name="auc")]
    model = worker.compiled(classifier, "categorical_crossentropy", metrics=metrics)
    stop = keras.callbacks.EarlyStopping("val_tp", mode="max", patience=1, restore_best_weights=True)
    result = fitted(model, X, ONE_HOT, validation_data=(X[:37], ONE_HOT[:37]), callbacks=[stop], epochs=4)
    return result | {"evaluated": model.evaluate(X, ONE_HOT, batch_size=BATCH, verbose=0)}


@case()
def confusion_metrics(worker: Worker) -> Result:
    """AUC, F1Score, MeanIoU, R2Score and other metrics of sums over rows"""
    metrics = [
        keras.metrics.AUC(name="auc"),
        keras.metrics.F1Score(average="macro", name="f1"),
        keras.metrics.OneHotMeanIoU(2, name="iou"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.TopKCategoricalAccuracy(1, name="top"),
        keras.metrics.R2Score(name="r2"),
    ]
    model = worker.compiled(classifier, "categorical_crossentropy", metrics=metrics)
    return fitted(model, X, ONE_HOT, validation_data=(X[:37], ONE_HOT[:37]))


@case()
def root_mean_squared_error(worker: Worker) -> Result:
    """RootMeanSquaredError, a function of sums over rows"""
    return fitted(
        worker.compiled(regressor, "mse", metrics=[keras.metrics.RootMeanSquaredError(), "cosine_similarity"]), X, T
    )


@case(f"{DIFFERS}log largest")
def metric_that_keeps_a_maximum(worker: Worker) -> Result:
    """a metric whose variable is the maximum over rows"""

    class Largest(keras.Metric):
        def __init__(self) -> None:
            super().__init__(name="largest")
            self.value = self.add_weight(shape=(), initializer="zeros", name="value")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.value.assign(ops.maximum(self.value, ops.max(ops.abs(y_pred))))

        def result(self) -> Any:
            return self.value

    with worker.strategy.scope():
        metric = Largest()
    return fitted(worker.compiled(regressor, "mse", metrics=[metric]), X, T)


@case(f"{DIFFERS}log lowest")
def metric_that_keeps_a_minimum(worker: Worker) -> Result:
    """a metric whose variable is the minimum over rows, from infinity on"""

    class Lowest(keras.Metric):
        def __init__(self) -> None:
            super().__init__(name="lowest")
            self.value = self.add_weight(shape=(), initializer=keras.initializers.Constant(np.inf), name="value")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.value.assign(ops.minimum(self.value, ops.min(ops.abs(y_pred))))

        def result(self) -> Any:
            return self.value

        def reset_state(self) -> None:
            self.value.assign(np.inf)

    with worker.strategy.scope():
        metric = Lowest()
    return fitted(worker.compiled(regressor, "mse", metrics=[metric]), X, T)


@case()
def metric_that_starts_at_one(worker: Worker) -> Result:
    """a metric whose sums over rows start at one"""

    class Smoothed(keras.Metric):
        def __init__(self) -> None:
            super().__init__(name="smoothed")
            self.hits = self.add_weight(shape=(), initializer="ones", name="hits")
            self.rows = self.add_weight(shape=(), initializer="ones", name="rows")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            self.hits.assign_add(ops.sum(ops.cast(y_pred > y_true, "float32")))
            self.rows.assign_add(ops.cast(ops.shape(y_pred)[0], "float32"))

        def result(self) -> Any:
            return self.hits / self.rows

        def reset_state(self) -> None:
            for variable in self.variables:
                variable.assign(1.0)

    with worker.strategy.scope():
        metric = Smoothed()
    model = worker.compiled(regressor, "mse", metrics=[metric])
    return fitted(model, X, T, validation_data=(X[:37], T[:37]))


@case(f"{DIFFERS}log f1_of_batch")
def metric_function_over_the_batch(worker: Worker) -> Result:
    """a metric function that is not a mean over rows"""

    def f1_of_batch(y: Any, p: Any) -> Any:
        p = ops.cast(p > 0.5, "float32")
        return ops.mean(2 * ops.sum(y * p, 0) / (ops.sum(y, 0) + ops.sum(p, 0) + 1e-7))

    return fitted(worker.compiled(classifier, "categorical_crossentropy", metrics=[f1_of_batch]), X, ONE_HOT)


@case()
def metric_function_of_rows(worker: Worker) -> Result:
    """a metric function that returns one value for each row"""

    def worst(y: Any, p: Any) -> Any:
        return ops.max(ops.abs(y - p), axis=-1)

    return fitted(worker.compiled(classifier, "categorical_crossentropy", metrics=[worst]), X, ONE_HOT)


@case()
def metric_function_of_a_scalar_mean(worker: Worker) -> Result:
    """a metric function that returns the mean of the batch as a scalar"""

    def bias(y: Any, p: Any) -> Any:
        return ops.mean(p - y)

    return fitted(worker.compiled(regressor, "mse", metrics=[bias]), X, T)


@case()
def weighted_metrics(worker: Worker) -> Result:
    """`weighted_metrics` with sample weights, and `class_weight`"""
    weights = np.linspace(0.1, 2, ROWS, dtype=np.float32)
    model = worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"], weighted_metrics=[CROSSENTROPY])
    first = fitted(model, X, Y, sample_weight=weights)
    second = fitted(model, X, Y, class_weight={0: 1.0, 1: 3.0})
    return first | {f"again {name}": value for name, value in second.items()}


@case()
def class_weight_of_shards(worker: Worker) -> Result:
    """`class_weight` with `distribute`"""
    size = BATCH // worker.num_workers
    rows = np.arange(ROWS - 1).reshape(-1, worker.num_workers, size)[:, worker.rank].ravel()
    data = worker.distribute(dataset(X[rows], Y[rows], size=size))
    model = worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"], weighted_metrics=[CROSSENTROPY])
    return fitted(model, data, class_weight={0: 1.0, 1: 3.0})


@case()
def metrics_of_a_layer(worker: Worker) -> Result:
    """a metric that a layer owns and updates in `call`"""

    class Watched(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.size = keras.metrics.Mean(name="size")

        def call(self, x: Any) -> Any:
            self.size.update_state(ops.mean(ops.abs(x), axis=-1))
            return x

    return fitted(worker.compiled(lambda: classifier(Watched), CROSSENTROPY, metrics=["accuracy"]), X, Y)


@case()
def logs_of_every_batch(worker: Worker) -> Result:
    """the logs that a callback gets in every step"""
    seen: list[tuple[float, float]] = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda _, logs: seen.append((logs["loss"], logs["accuracy"]))
    )
    model = worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"])
    history = model.fit(X, Y, callbacks=[watch], **FIT)
    return outcome(model, history.history, seen=seen)
