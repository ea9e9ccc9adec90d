"""What a case of several workers is: code that runs in each worker, and what is expected of it.

The modules `cases_*.py` contain the cases. Their docstrings are the rows of the table in docs/multiworker.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline import multiworker

Result = dict[str, Any]
"""What a worker found: numbers and arrays by name, which have to be equal to those of a single process."""

ROWS, BATCH = 97, 16  # the last batch has one row, so that all workers but one have none
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
T = (X[:, :1] * 2 - X[:, 1:2] + 0.5).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(size=(41, 8, 8, 3)).astype(np.float32)
CLASSES = (IMAGES.mean((1, 2, 3)) > 0.5).astype(np.int32)
CROSSENTROPY = "sparse_categorical_crossentropy"
FIT: dict[str, Any] = {"batch_size": BATCH, "epochs": 2, "verbose": 0}

EQUAL = "equal"
"""The expectation that all workers find the numbers of one process."""
DIFFERS = "the first step would differ from that of one process: "
"""The beginning of the message about what a worker would compute in another way; the name of the value follows."""
OTHER_BATCHES = "the workers were given different batches.*set_random_seed.*distribute"
"""The message about workers whose data differ."""


@dataclass(frozen=True)
class Worker:
    """The worker in which a case runs.

    Attributes:
        rank: Number of this worker.
        num_workers: 1 for the process that the others are compared with.
        folder: Folder that the workers share.
        stock: Whether `enable` does nothing, so that the only process trains as Keras does.
        strategy: Strategy in whose scope models are made.
    """

    rank: int
    num_workers: int
    folder: Path
    stock: bool
    strategy: tf.distribute.Strategy

    def enable(self, model: keras.Model, **arguments: Any) -> keras.Model:
        if not self.stock:
            multiworker.enable(model, **arguments)
        return model

    def compiled(
        self,
        make: Callable[[], keras.Model],
        loss: Any = None,
        optimizer: Callable[[], keras.optimizers.Optimizer] = lambda: keras.optimizers.SGD(0.1),
        enable: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> keras.Model:
        """Creates and compiles a model within the scope of the strategy, and enables it."""
        with self.strategy.scope():
            model = make()
            model.compile(optimizer(), loss, **arguments)
        return self.enable(model, **(enable or {}))

    def part(self) -> None:
        """Notes the time at which this worker leaves the others."""
        (self.folder / "parted").touch()

    def distribute(self, dataset: tf.data.Dataset) -> Any:
        return multiworker.distribute(dataset, self.strategy)


@dataclass(frozen=True)
class Case:
    """Code that several workers and one process run, and what is expected of them.

    Attributes:
        function: Runs in every worker.
        expected: EQUAL, or a regular expression that the message of every worker's error matches, or one for each rank;
            an empty one is that of a rank that leaves and need not raise.
        workers: Numbers of processes, of which each is compared with one process.
        slow: Whether only `make test-all` runs it.
        stock: Whether the one process runs Keras without `enable`.
        learns: Whether the loss has to change from the first epoch to the last.
        parts: Whether the workers part, so that each has to end by itself and soon.
    """

    function: Callable[[Worker], Result]
    expected: str | tuple[str, ...]
    workers: tuple[int, ...] = (2,)
    slow: bool = True
    stock: bool = True
    learns: bool = True
    parts: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def what(self) -> str:
        """The row of the table."""
        return " ".join((self.function.__doc__ or "").split())


CASES: dict[str, Case] = {}


def case(
    expected: str | tuple[str, ...] = EQUAL, **arguments: Any
) -> Callable[[Callable[[Worker], Result]], Callable[[Worker], Result]]:
    """Registers a function as a case."""

    def register(function: Callable[[Worker], Result]) -> Callable[[Worker], Result]:
        assert function.__name__ not in CASES, function.__name__
        CASES[function.__name__] = Case(function, expected, **arguments)
        return function

    return register


def classifier(*middle: Callable[[], keras.Layer]) -> keras.Model:
    dense = keras.layers.Dense
    return keras.Sequential(
        [keras.layers.Input((4,)), dense(8, activation="relu"), *[make() for make in middle], dense(2, "softmax")]
    )


def regressor() -> keras.Model:
    return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])


def fitted(model: keras.Model, *data: Any, **arguments: Any) -> Result:
    """Fits and returns the losses, metrics and weights."""
    defaults = {"batch_size": BATCH} if isinstance(data[0], np.ndarray | dict) else {}
    history = model.fit(*data, **({"epochs": 2, "verbose": 0} | defaults | arguments))
    return outcome(model, history.history)


def outcome(model: keras.Model, logs: dict[str, Any] | None = None, **more: Any) -> Result:
    return (logs or {}) | {f"weights {i}": value for i, value in enumerate(model.get_weights())} | more


def batches(*arrays: np.ndarray, size: int = BATCH) -> Iterator[Any]:
    """Batches of rows in their order, as a generator of one's own yields them."""
    for start in range(0, len(arrays[0]), size):
        yield tuple(array[start : start + size] for array in arrays)


def dataset(*arrays: np.ndarray, size: int = BATCH) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(size)
