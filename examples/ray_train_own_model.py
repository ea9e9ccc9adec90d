"""Trains a Keras 3 model of your own on your own data with two Ray Train workers.

    python examples/ray_train_own_model.py        # starts Ray on this machine; about 40 s on 2 cores

If RAY_ADDRESS is set, it runs on that cluster. The only part of this project that it needs is pipeline/multiworker; the
loop, the data, checkpoints and evaluation are yours. own_model.py gives a model to the pipeline, which has these.
"""

import tempfile
from typing import Any

import ray.train
from ray.train.tensorflow import TensorflowTrainer


def train_loop_per_worker(config: dict[str, Any]) -> list[float]:
    """Runs on every worker, where Ray has set TF_CONFIG; returns the validation accuracy after each epoch."""
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    from pipeline import multiworker

    # By default each worker would use all cores. The strategy starts TensorFlow, so this must come before it.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    multiworker.wait_for_workers()  # says for whom it waits; TensorFlow would wait for an hour
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(config["seed"])  # the same on all workers: each shuffles all rows and takes its share

    digits = load_digits()
    x, y = digits.images[..., None].astype("float32") / 16, digits.target.astype("int32")

    with strategy.scope():
        model = keras.Sequential(
            [
                keras.layers.Input((8, 8, 1)),
                keras.layers.Conv2D(16, 3, activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dropout(0.2),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
        optimizer = keras.optimizers.Adam(config["learning_rate"])
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    multiworker.enable(model)

    # The metrics are the same on all workers. Ray Train requires that every worker reports.
    report = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ray.train.report({"epoch": epoch, **logs}))
    history = model.fit(
        x[:1500],
        y[:1500],
        batch_size=50,
        epochs=config["epochs"],
        validation_data=(x[1500:], y[1500:]),
        callbacks=[report],
        verbose=0,
    )
    return history.history["val_accuracy"]


def main() -> None:
    with tempfile.TemporaryDirectory() as storage:
        trainer = TensorflowTrainer(
            train_loop_per_worker,  # type: ignore[arg-type]  # Ray declares that it returns nothing
            train_loop_config={"epochs": 5, "learning_rate": 3e-3, "seed": 0},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="own_model", storage_path=storage),
        )
        # Ray keeps only metrics that are reported with a checkpoint, so take the value that rank 0 returned.
        accuracies = trainer.fit().return_value  # type: ignore[attr-defined]
    print(f"validation accuracy after epoch {len(accuracies)}: {accuracies[-1]:.1%}")


if __name__ == "__main__":
    main()
