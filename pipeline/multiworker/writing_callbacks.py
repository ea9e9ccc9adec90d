"""Callbacks that write files: the first worker alone writes, so that all workers can be given the same path."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from .keras_internals import replaced

# They only write, so other workers than the first go without them.
ONLY_WRITE = (keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
WRITE = (*ONLY_WRITE, keras.callbacks.BackupAndRestore, keras.callbacks.ModelCheckpoint)
_HOOKS = ("on_train_batch_end", "on_epoch_end", "on_train_end")


@contextlib.contextmanager
def written_by_first(callbacks: list[keras.callbacks.Callback], model: keras.Model, rank: int) -> Iterator[list[Any]]:
    """Yields the callbacks for this worker; within this context those of other workers than the first write nothing.

    All workers read: BackupAndRestore continues on every worker from what the first has written.
    """
    if rank == 0:
        yield callbacks
        return
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            for hook in _HOOKS:
                if isinstance(callback, keras.callbacks.BackupAndRestore):
                    stack.enter_context(replaced(callback, hook, _nothing))
                elif isinstance(callback, keras.callbacks.ModelCheckpoint):
                    stack.enter_context(replaced(callback, hook, _without_saving(getattr(callback, hook), model)))
        yield [callback for callback in callbacks if not isinstance(callback, ONLY_WRITE)]


def _without_saving(hook: Callable[..., None], model: keras.Model) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        with replaced(model, "save", _nothing), replaced(model, "save_weights", _nothing):
            hook(*args, **kwargs)

    return run


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a method that writes."""
