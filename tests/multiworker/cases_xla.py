"""XLA"""

import keras
import numpy as np
from case_registry import BATCH, FIT, ROWS, Result, Worker, X, Y, case, classifier, fitted
from cases_features import mlp, sgd


@case()
def xla(worker: Worker) -> Result:
    """`compile(jit_compile=True)`"""
    return fitted(mlp(worker, jit_compile=True), X, Y)


@case(stock=False)
def xla_in_mixed_precision(worker: Worker) -> Result:
    """XLA, mixed precision, loss scaling and dropout together: the loss falls and the seeds are drawn alike"""
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp(worker, lambda: keras.layers.Dropout(0.1), jit_compile=True, optimizer=sgd)
    losses = model.fit(X, Y, **(FIT | {"epochs": 3})).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    seeds = [v.numpy() for v in model.variables if v.name == "seed_generator_state"]
    return {"loss falls": [1, 0], "scale": model.optimizer.dynamic_scale.numpy(), "drawn": seeds[0][1]}


@case()
def xla_and_the_update(worker: Worker) -> Result:
    """XLA with Adam, accumulated and clipped gradients, and an average of the weights"""
    averaged = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3}
    optimizer = lambda: keras.optimizers.Adam(  # noqa: E731
        0.01, gradient_accumulation_steps=2, global_clipnorm=0.5, **averaged
    )
    return fitted(mlp(worker, jit_compile=True, optimizer=optimizer), X, Y)


@case("communicates within the forward pass.*jit_compile=False")
def xla_and_batch_normalization(worker: Worker) -> Result:
    """`BatchNormalization(synchronized=True)` with `jit_compile=True`"""
    norm = lambda: keras.layers.BatchNormalization(synchronized=True)  # noqa: E731
    return fitted(mlp(worker, norm, jit_compile=worker.num_workers > 1), X, Y)


@case("a loss under a mask.*communicates within the forward pass.*jit_compile=False")
def xla_and_a_mask(worker: Worker) -> Result:
    """`ignore_class=-1` with `jit_compile=True`, where the first batch has no class that is ignored"""
    labels = np.where((np.arange(ROWS) < BATCH) | (np.arange(ROWS) % 16 > 4), Y, -1)
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    return fitted(worker.compiled(classifier, loss, jit_compile=True), X, labels, shuffle=False)
