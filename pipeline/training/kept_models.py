"""Keeps compiled models, so that the next training with a model of the same shape need not trace its steps again.

TensorFlow traces the steps of a model in Python, which takes seconds, and the trials of a search often differ only in
learning rate and weight decay. In a model that is kept these two are variables. All its other variables are set to what
they were at the start, so that a training gives the same results, to the bit, as with a model of its own.

TensorFlow also prepares the steps for their execution, which takes a second. It forgets what it has prepared, for all
models, when its seed is set or when Keras's session is cleared. Both are therefore done only where they are needed.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np

from perceiver.config import PerceiverConfig
from pipeline import multiworker
from pipeline.training.checkpoint import variables_by_kind
from pipeline.training.config import TrainingConfig
from pipeline.training.optimization import Rates
from pipeline.training.throughput import StepClock

MOST_KEPT = 4
"""Models that a process keeps: the weights, the optimizer and the traced steps of each."""


@dataclass(frozen=True)
class Compiled:
    """A model that can be trained, and what its traced steps refer to.

    Attributes:
        model: Built, compiled and enabled.
        rates: Learning rate and weight decay, where they are variables.
        clock: Clock that the steps write to.
    """

    model: keras.Model
    rates: Rates | None
    clock: StepClock


class KeptModels:
    """The last models that a process has trained, for trainings by one worker.

    Args:
        most: Number of models.
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._models: dict[str, tuple[Compiled, dict[str, list[np.ndarray]]]] = {}
        self._dropped = False

    def free_memory(self) -> None:
        """Frees what is left of models that are no longer kept; for the time between two trainings."""
        if self._dropped:
            keras.utils.clear_session(free_memory=False)
            self._dropped = False
        gc.collect()  # arrays in cycles
        if not gc.get_freeze_count():
            gc.freeze()  # imported modules are scanned only once

    @functools.cached_property
    def stop(self) -> multiworker.StopSignal:
        """The request to stop that the steps of all these models read."""
        return multiworker.StopSignal()

    @contextlib.contextmanager
    def lend(
        self,
        model: PerceiverConfig,
        config: TrainingConfig,
        class_counts: Sequence[int] | None,
        steps: int,
        build: Callable[[], Compiled],
    ) -> Iterator[Compiled]:
        """A model for a training that starts, for the time of the block. It is not kept if the block raises an error.

        Args:
            model: Model settings. A Perceiver draws from no generator but its own, so a kept one needs no seed.
            config: Training settings.
            class_counts: Number of training rows of each class.
            steps: Steps of an epoch.
            build: Sets the seed and makes the model, if none is kept; its `rates` must be variables.
        """
        same = replace(config, learning_rate=1.0, weight_decay=float(config.weight_decay > 0))
        key = repr((model, same, class_counts, steps))
        if key in self._models:
            lent, start = self._models.pop(key)
            _reset(lent, start, config)
        else:
            while len(self._models) >= self._most:
                del self._models[next(iter(self._models))]
                self._dropped = True
            try:
                lent = build()
                lent.model.optimizer.build(lent.model.trainable_variables)
                start = {kind: [np.array(v) for v in found] for kind, found in variables_by_kind(lent.model).items()}
            except Exception:
                self._dropped = True
                raise
        self.stop.reset()
        try:
            yield lent
        except Exception:
            self._dropped = True
            raise
        except BaseException:  # a trial that is stopped
            self._models[key] = lent, start
            raise
        self._models[key] = lent, start


def _reset(lent: Compiled, start: dict[str, list[np.ndarray]], config: TrainingConfig) -> None:
    for kind, variables in variables_by_kind(lent.model).items():
        for variable, value in zip(variables, start[kind], strict=True):
            variable.assign(value)
    assert lent.rates is not None
    lent.rates.set(config)
    if config.learning_rate_schedule != "cosine":  # a variable of the optimizer
        lent.model.optimizer.learning_rate = config.learning_rate
