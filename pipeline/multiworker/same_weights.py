"""Whether all workers have the same weights: they begin with them, unless a worker loads or adapts others."""

import zlib

import keras
import numpy as np
import tensorflow as tf

from .exchange import of_all_workers, sum_over_workers

# Largest difference, relative to the largest number of a variable. Processors of another kind round otherwise.
TOLERANCE = 1e-3


def refuse_other_weights(model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Compares the variables of the model and of its optimizer between the workers; all workers call it.

    The names are not compared, because a worker that has made other models before counts them on.

    Raises:
        ValueError: on all workers, if a variable differs; the message contains its name.
    """
    variables = [*model.weights, *getattr(model.optimizer, "variables", [])]
    values = [tf.convert_to_tensor(strategy.experimental_local_results(each.value)[0]).numpy() for each in variables]
    shapes = zlib.crc32(str([value.shape for value in values]).encode())
    if len(set(of_all_workers(strategy, shapes))) > 1:
        raise ValueError(
            f"the workers have different models: the one here has {len(values)} variables of the shapes "
            f"{', '.join(str(value.shape) for value in values[:8])}{', ...' if len(values) > 8 else ''}. Make and "
            "compile the same model on every worker"
        )
    bits = 0
    for value in values:
        bits = zlib.crc32(value.tobytes(), bits)
    if len(set(of_all_workers(strategy, bits))) == 1:
        return
    different = _first_different(values, strategy)
    if different is not None:
        raise ValueError(
            f"the workers have different weights: {variables[different].path} is not the same on all of them. Load "
            "or set weights, adapt layers such as Normalization, set the learning rate, and give callbacks that do so, "
            "such as EarlyStopping and ReduceLROnPlateau, on every worker alike"
        )


def _first_different(values: list[np.ndarray], strategy: tf.distribute.Strategy) -> int | None:
    for index, value in enumerate(values):
        own = value.astype(np.float64).ravel()
        mean = sum_over_workers(strategy, own) / strategy.num_replicas_in_sync
        with np.errstate(invalid="ignore"):
            apart = np.max(np.where(own == mean, 0.0, np.abs(own - mean)), initial=0.0)
        differs = apart > TOLERANCE * np.max(np.abs(own), initial=0.0)  # not where a weight is NaN: the loss says that
        if any(of_all_workers(strategy, int(differs))):
            return index
    return None
