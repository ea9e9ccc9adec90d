"""Trains a Keras 3 model of your own on your own data in two processes, without Ray.

    python examples/keras_two_processes.py        # starts both processes; about 20 s on 2 cores

To train on several hosts, start the script on each of them with TF_CONFIG set. Only `index` differs between the hosts:

    TF_CONFIG='{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'

The only part of this project that it needs is pipeline/multiworker.
"""

import json
import os
import socket
import subprocess
import sys


def train() -> None:
    import keras
    import numpy as np
    import tensorflow as tf

    from pipeline import multiworker

    # By default each process would use all cores. The strategy starts TensorFlow, so this must come before it.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    multiworker.wait_for_workers()  # says for whom it waits; TensorFlow would wait for an hour
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)  # the same in all processes: each shuffles all rows and takes its share

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1001, 8)).astype("float32")
    y = (x[:, 0] * x[:, 1] > 0).astype("int32")

    with strategy.scope():
        model = keras.Sequential(
            [
                keras.layers.Input((8,)),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.BatchNormalization(synchronized=True),
                keras.layers.Dense(2, activation="softmax"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    multiworker.enable(model)

    chief = strategy.cluster_resolver.task_id == 0
    model.fit(x[:801], y[:801], batch_size=64, epochs=10, validation_data=(x[801:], y[801:]), verbose=2 * chief)
    predictions = model.predict(x[801:], batch_size=64, verbose=0)  # collective: all processes call it and get all rows
    if chief:
        accuracy = np.mean(predictions.argmax(axis=1) == y[801:])
        print(f"{len(predictions)} rows predicted, {accuracy:.0%} of them right")


def start_two() -> None:
    """Runs this script in two processes, each with its own TF_CONFIG."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()
    processes = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = os.environ | {"TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "2"}
        processes.append(subprocess.Popen([sys.executable, __file__], env=environment))
    sys.exit(max(abs(process.wait()) for process in processes))


if __name__ == "__main__":
    train() if "TF_CONFIG" in os.environ else start_two()
