"""Makes `fit`, `evaluate` and `predict` of Keras 3 work on several workers under MultiWorkerMirroredStrategy.

Stock Keras 3.15 fails there (https://github.com/keras-team/keras/issues/20585). One call fixes it:

    multiworker.wait_for_workers()  # or an error; TensorFlow alone would wait for an hour
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)  # the same on every worker, because each worker shuffles the data itself
    with strategy.scope():
        model = ...
        model.compile(...)
    multiworker.enable(model)
    model.fit(x, y, batch_size=128, validation_data=(x_val, y_val), ...)

Whatever `fit` takes is passed as in a single process: every worker is given all rows, in global batches and in the same
order, and trains on its share of each batch. A worker that holds only its own rows passes
`distribute(its_batches, strategy)` instead.

The package needs only TF_CONFIG, and neither Ray nor the rest of this project. docs/multiworker.md lists what works,
what is refused, and why.

tf_config.py            what TF_CONFIG says of the workers
proxies.py              keeps HTTP proxies out of the way of the workers
rendezvous.py           waits until the workers reach one another
enable.py               the methods of a model that are replaced
data.py                 a replica's share of a global batch; batches that a worker has for itself
iterators.py            batches that are released in the background
functions.py            the functions that Keras calls for steps and predictions
predictions.py          puts the predictions of the workers together
xla_step.py             a training step with jit_compile=True
one_replica.py          what Keras sees within a step: one replica, with sums over all
metrics.py              metrics and logs over all replicas; finds batches that differ
first_step.py           compares a step of one process with that of the workers
comparison.py           whether two computations of a step found the same
refusals.py             what is refused before the first step
same_weights.py         compares the weights of the workers
few_rows.py             the first rows of the first batch of all workers
precision.py            the precision of this comparison
exchange.py             what workers tell each other outside of a step
constant_randomness.py  random numbers for this comparison
clipping.py             clipping that acts on the few rows of this comparison too
metric_results.py       the result of a metric, for which all workers have to ask
guard.py                ends a call in which a worker would wait for ever
writing_callbacks.py    the first worker alone writes files
stop_signal.py          a request to stop that all workers see after the same step
vectors.py              several tensors as one vector
compressed.py           gradients that travel in bfloat16
keras_internals.py      private names of Keras and TensorFlow, compared with the installed ones
"""

from .data import distribute
from .enable import enable
from .keras_internals import PRIVATE_ATTRIBUTES, PRIVATE_NAMES, check_keras
from .proxies import bypass_proxies
from .rendezvous import wait_for_workers
from .stop_signal import StopSignal

__all__ = [
    "PRIVATE_ATTRIBUTES",
    "PRIVATE_NAMES",
    "StopSignal",
    "bypass_proxies",
    "check_keras",
    "distribute",
    "enable",
    "wait_for_workers",
]

# When the package is imported, because the strategy, which is created next, would hang.
bypass_proxies()
