"""What the cases of tests/multiworker_cases.py share: the strategy of this process, data, and enabled models.

Importing it sets this process up as one of several, as the JSON in the first argument orders.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

ORDERS = json.loads(sys.argv[1])
RANK, ADDRESSES = ORDERS["rank"], ORDERS["addresses"]
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
if len(ADDRESSES) > 1:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": ADDRESSES}, "task": {"type": "worker", "index": RANK}})

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from pipeline import multiworker  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
STRATEGY = tf.distribute.MultiWorkerMirroredStrategy() if len(ADDRESSES) > 1 else tf.distribute.get_strategy()

Result = dict[str, Any]
CASES: dict[str, Callable[[], Result]] = {}
ROWS, BATCH = 101, 16  # the last batch has 5 rows, of which only the first of two workers gets some
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
LOSS = "sparse_categorical_crossentropy"
FIT: dict[str, Any] = {"batch_size": BATCH, "epochs": 2, "verbose": 0}


def case(function: Callable[[], Result]) -> Callable[[], Result]:
    CASES[function.__name__] = function
    return function


def sgd(**arguments: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9, **arguments)


def classifier(*middle: Callable[[], keras.Layer]) -> keras.Model:
    dense = keras.layers.Dense
    return keras.Sequential(
        [keras.layers.Input((4,)), dense(8, activation="relu"), *[make() for make in middle], dense(2, "softmax")]
    )


def enabled(
    make: Callable[[], keras.Model] = classifier,
    optimizer: Callable[[], keras.optimizers.Optimizer] = sgd,
    stop: multiworker.StopSignal | None = None,
    **compiled: Any,
) -> keras.Model:
    keras.utils.set_random_seed(1)
    with STRATEGY.scope():
        model = make()
        model.compile(optimizer(), **({"loss": LOSS, "metrics": ["accuracy"]} | compiled))
    multiworker.enable(model, stop)
    return model


def outcome(model: keras.Model, history: keras.callbacks.History, **more: Any) -> Result:
    return history.history | {f"weights_{i}": value for i, value in enumerate(model.get_weights())} | more


def twice(run: Callable[[], Result]) -> Result:
    """The results of a run and of its repetition."""
    return {f"{which}_{name}": value for which in ("first", "second") for name, value in run().items()}
