"""What is known before the first step to differ from one process, and is refused with a remedy."""

import keras
import tensorflow as tf

from .one_replica import MEANS


def refuse_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises a ValueError unless it is a MultiWorkerMirroredStrategy whose workers have one device each."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ValueError(
            f"the model was created in a {type(strategy).__name__}, in which Keras trains by itself: leave out "
            "multiworker.enable, or create the model in a MultiWorkerMirroredStrategy"
        )
    devices = strategy.extended.worker_devices
    if len(devices) > 1:
        raise ValueError(
            f"this worker has the devices {', '.join(devices)}: start one process for each device, for instance with "
            "CUDA_VISIBLE_DEVICES"
        )


def refuse_training(model: keras.Model) -> None:
    """Raises a ValueError for a compiled loss that is no mean over rows, and for XLA with an own `train_step`."""
    for loss in tf.nest.flatten(model.loss):
        reduction = getattr(loss, "reduction", MEANS[0])
        if reduction not in MEANS:
            raise ValueError(
                f"{loss} has reduction={reduction!r}, which is not a mean over rows and depends on how they are "
                f"divided among the workers: take one of {MEANS}"
            )
    if model.jit_compile and type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"{type(model).__name__} has a train_step of its own, of which the forward and backward pass cannot be "
            "told apart for XLA: override compute_loss instead, or compile with jit_compile=False"
        )


def refuse_stateful_layers(model: keras.Model) -> None:
    """Raises a ValueError for a recurrent layer that keeps the state of each row from one batch to the next.

    Such a layer needs batches of one size, and a worker gets a part of each.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.RNN | keras.layers.Bidirectional) and layer.stateful:
            raise ValueError(
                f"{layer.name} has stateful=True: it keeps a state for each row of a batch, and needs batches of one "
                "size, while the rows of a batch are divided among the workers. Take stateful=False and pass whole "
                "sequences, or train in one process"
            )
