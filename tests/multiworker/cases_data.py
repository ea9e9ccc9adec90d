"""Data"""

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from case_registry import (
    BATCH,
    CROSSENTROPY,
    OTHER_BATCHES,
    ROWS,
    Result,
    T,
    Worker,
    X,
    Y,
    batches,
    case,
    classifier,
    dataset,
    fitted,
    regressor,
)

STEPS = -(-ROWS // BATCH)


class Sequence(keras.utils.PyDataset):
    """Batches in a fixed order, of which the first take the longest."""

    def __init__(self, pause: float = 0.0, shuffled: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.pause = pause
        self.order = np.arange(ROWS)
        self.shuffled = shuffled

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.pause * (STEPS - index))
        rows = self.order[index * BATCH : (index + 1) * BATCH]
        return X[rows], Y[rows]

    def on_epoch_end(self) -> None:
        if self.shuffled:
            np.random.shuffle(self.order)


def mlp(worker: Worker) -> keras.Model:
    return worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"])


@case(slow=False, learns=False)
def evaluate_a_generator(worker: Worker) -> Result:
    """`evaluate` of a Python generator"""
    identity = lambda: keras.Sequential([keras.layers.Input((1,)), keras.layers.Identity()])  # noqa: E731
    model = worker.compiled(identity, "mse", metrics=["mae"])
    ids = np.arange(48, dtype=np.float32)[:, None]
    loss, error = model.evaluate(batches(ids, np.zeros_like(ids), size=8), verbose=0)
    return {"loss": loss, "mae": error}


@case()
def fit_a_generator(worker: Worker) -> Result:
    """`fit` of an endless Python generator, with `steps_per_epoch`"""

    def endless() -> Any:
        while True:
            yield from batches(X, Y)

    return fitted(mlp(worker), endless(), steps_per_epoch=STEPS)


@case(learns=False)
def predict_a_generator(worker: Worker) -> Result:
    """`predict` of a Python generator"""
    model = mlp(worker)
    return {"predicted": model.predict(batches(X), verbose=0)}


@case()
def pydataset(worker: Worker) -> Result:
    """`PyDataset`"""
    return fitted(mlp(worker), Sequence(), shuffle=False, validation_data=Sequence())


@case(slow=False)
def pydataset_with_two_workers(worker: Worker) -> Result:
    """`PyDataset(workers=2)` with the default shuffle"""
    return fitted(mlp(worker), Sequence(workers=2, max_queue_size=4), validation_data=Sequence(workers=2))


@case()
def slow_pydataset(worker: Worker) -> Result:
    """`PyDataset(workers=2)` whose batches take unequal times, on unequal workers"""
    pause = 0.02 * (1 + 2 * worker.rank)
    return fitted(mlp(worker), Sequence(pause, workers=2), shuffle=False)


@case()
def pydataset_that_shuffles_itself(worker: Worker) -> Result:
    """`PyDataset` that shuffles its rows in `on_epoch_end`, with a seed"""
    return fitted(mlp(worker), Sequence(shuffled=True), shuffle=False, epochs=3)


@case(slow=False)
def shuffled_dataset_with_a_seed(worker: Worker) -> Result:
    """`tf.data` with `shuffle(seed=...)`, without `cache`"""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS, seed=3).batch(BATCH)
    return fitted(mlp(worker), data, epochs=3)


@case()
def shuffled_dataset_with_the_global_seed(worker: Worker) -> Result:
    """`tf.data` with `shuffle()` after `set_random_seed`"""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS).batch(BATCH)
    return fitted(mlp(worker), data, epochs=3)


@case()
def cached_shuffled_and_repeated(worker: Worker) -> Result:
    """`cache().shuffle(seed=...).repeat().batch()` with `steps_per_epoch`"""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).cache().shuffle(ROWS, seed=5).repeat().batch(BATCH)
    return fitted(mlp(worker), data, steps_per_epoch=5, epochs=3)


@case(OTHER_BATCHES, slow=False)
def shuffled_dataset_without_a_seed(worker: Worker) -> Result:
    """`tf.data` with `shuffle()` whose seed differs between the workers"""
    tf.random.set_seed(worker.rank)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS).batch(BATCH)
    return fitted(mlp(worker), data)


@case(OTHER_BATCHES)
def shuffled_arrays_without_a_seed(worker: Worker) -> Result:
    """arrays that `fit` shuffles, with unequal seeds"""
    tf.random.set_seed(worker.rank)
    return fitted(mlp(worker), X, Y)


@case(OTHER_BATCHES)
def shards_by_mistake(worker: Worker) -> Result:
    """`dataset.shard(num_workers, rank)` given to `fit` without `distribute`"""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shard(worker.num_workers, worker.rank).batch(BATCH)
    return fitted(mlp(worker), data)


@case(f"{OTHER_BATCHES}|with as many batches")
def unequal_numbers_of_batches(worker: Worker) -> Result:
    """a dataset that has more batches on one worker than on the others"""
    return fitted(mlp(worker), dataset(X, Y).take(STEPS - worker.rank))


def records(worker: Worker, files: int) -> list[str]:
    """Writes the rows as TFRecord files; every worker has its own copy."""
    paths = []
    for number in range(files):
        path = worker.folder / f"{worker.rank}-{number}.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for x, y in zip(X[number::files], T[number::files], strict=True):
                row = np.concatenate([x, y])
                feature = tf.train.Feature(float_list=tf.train.FloatList(value=row))
                writer.write(tf.train.Example(features=tf.train.Features(feature={"row": feature})).SerializeToString())
        paths.append(str(path))
    return paths


def parsed(example: Any) -> Any:
    row = tf.io.parse_single_example(example, {"row": tf.io.FixedLenFeature([5], tf.float32)})["row"]
    return row[:4], row[4:]


@case()
def tfrecords_of_several_files(worker: Worker) -> Result:
    """`TFRecordDataset` of four files: `fit`, and `predict` in the order of the rows"""
    data = tf.data.TFRecordDataset(records(worker, 4)).map(parsed).batch(BATCH)
    model = worker.compiled(regressor, "mse")
    result = fitted(model, data)
    return result | {"predicted": model.predict(data.map(lambda x, _: x), verbose=0)}


@case()
def tfrecords_of_one_file(worker: Worker) -> Result:
    """`TFRecordDataset` of one file"""
    data = tf.data.TFRecordDataset(records(worker, 1)).map(parsed).batch(BATCH)
    return fitted(worker.compiled(regressor, "mse"), data)


@case()
def interleaved_tfrecords(worker: Worker) -> Result:
    """`interleave` over TFRecord files with a seeded shuffle, as in the guide of `tf.data`"""
    files = tf.data.Dataset.from_tensor_slices(records(worker, 4))
    data = files.interleave(tf.data.TFRecordDataset, cycle_length=2, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.map(parsed, num_parallel_calls=tf.data.AUTOTUNE).shuffle(32, seed=7).batch(BATCH).prefetch(2)
    return fitted(worker.compiled(regressor, "mse"), data)


@case()
def dropped_remainder(worker: Worker) -> Result:
    """`batch(15, drop_remainder=True)`, which two workers cannot share evenly"""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(15, drop_remainder=True)
    return fitted(mlp(worker), data)


@case()
def batches_of_one_row(worker: Worker) -> Result:
    """batches of one row, of which all workers but one have none"""
    model = worker.compiled(classifier, CROSSENTROPY, lambda: keras.optimizers.SGD(0.01), metrics=["accuracy"])
    return fitted(model, X[:12], Y[:12], batch_size=1, shuffle=False)


@case()
def steps_per_execution(worker: Worker) -> Result:
    """`compile(steps_per_execution=3)` with seven batches"""
    model = worker.compiled(classifier, CROSSENTROPY, metrics=["accuracy"], steps_per_execution=3)
    result = fitted(model, X, Y, validation_data=(X[:37], Y[:37]))
    return result | {"predicted": model.predict(X, batch_size=BATCH, verbose=0)}


@case()
def distributed_batches(worker: Worker) -> Result:
    """`distribute` of the slices of each worker"""
    rows = [
        np.array_split(np.arange(i, min(i + BATCH, 96)), worker.num_workers)[worker.rank] for i in range(0, 96, BATCH)
    ]
    data = tf.data.Dataset.from_generator(
        lambda: ((X[i], Y[i]) for i in rows),
        output_signature=(tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int32)),
    )
    model = mlp(worker)
    result = fitted(model, worker.distribute(data), validation_data=worker.distribute(data))
    return result | {"predicted": model.predict(worker.distribute(data), verbose=0)}


@case()
def validation_split(worker: Worker) -> Result:
    """`validation_split`"""
    return fitted(mlp(worker), X, Y, validation_split=0.3)


@case(slow=False)
def endless_validation_data(worker: Worker) -> Result:
    """endless `validation_data`, of which each validation takes the first `validation_steps` batches anew"""
    data = dataset(X, Y).repeat()
    return fitted(mlp(worker), data, steps_per_epoch=STEPS, epochs=3, validation_data=data, validation_steps=3)


@case("unequal numbers of rows")
def a_table_in_the_batch(worker: Worker) -> Result:
    """a batch with a tensor that has other rows, such as a table"""
    table = tf.constant([[0.1], [0.2], [0.3]])
    return fitted(worker.compiled(classifier, CROSSENTROPY), dataset(X, Y).map(lambda x, y: ((x, table), y)))


@case("unequal numbers of rows")
def a_table_of_any_size_in_the_batch(worker: Worker) -> Result:
    """the same, where the number of rows is not known before"""
    table = tf.data.Dataset.from_tensors(tf.constant([[0.1], [0.2], [0.3]])).unbatch().batch(3).repeat()
    data = tf.data.Dataset.zip((dataset(X), table, dataset(Y))).map(lambda x, t, y: ((x, t), y))
    return fitted(worker.compiled(classifier, CROSSENTROPY), data)


@case()
def integers_without_a_zero(worker: Worker) -> Result:
    """IntegerLookup that knows no 0, and classes that are counted from 1"""

    def make() -> keras.Model:
        ids = keras.Input((2,), dtype="int64")
        known = keras.layers.IntegerLookup(vocabulary=[5, 6, 7], num_oov_indices=0)(ids)
        return keras.Model(ids, keras.layers.Dense(2, "softmax")(keras.layers.Embedding(3, 4)(known)))

    def loss(y: Any, p: Any) -> Any:
        return keras.losses.sparse_categorical_crossentropy(y - 1, p)

    ids = np.arange(2 * ROWS).reshape(ROWS, 2) % 3 + 5
    return fitted(worker.compiled(make, loss), ids, ids % 2 + 1)
