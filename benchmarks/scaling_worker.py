"""A worker of `benchmarks/scaling.py` on one of its hosts: sums vectors, or trains; its argument is JSON.

It prints one line of JSON: for each size the seconds of each sum; or for each dtype of the gradients the mean seconds
of a training step in each turn.
"""

import json
import sys
import time
from typing import Any


def main(order: dict[str, Any]) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    print(json.dumps(steps(strategy, order) if "train" in order else sums(strategy, order)))
    # The other worker may still need this one's port; TensorFlow itself would wait for it to end.
    sys.stdout.flush()
    time.sleep(1)


def sums(strategy: Any, order: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each sum of a float32 vector, by its size in bytes."""
    import tensorflow as tf

    totals = {}
    for size in order["sizes"]:
        vector = tf.fill([size // 4], 1.0)

        def replica(vector: Any) -> Any:
            own = tf.identity(vector)  # the strategy wants to know its device
            summed = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)
            return summed[0] + summed[-1]

        total = tf.function(lambda vector=vector, replica=replica: strategy.run(replica, args=(vector,)))
        assert float(total()) == 2 * strategy.num_replicas_in_sync  # traces, and opens the connections
        totals[str(size)] = total
    found: dict[str, list[float]] = {size: [] for size in totals}
    for _ in range(order["turns"]):
        for size, total in totals.items():
            start = time.perf_counter()
            total().numpy()
            found[size].append(time.perf_counter() - start)
    return found


def steps(strategy: Any, order: dict[str, Any]) -> dict[str, list[float]]:
    """Mean seconds of a training step in each turn, by the dtype in which the gradients travel."""
    import keras
    import numpy as np
    import tensorflow as tf

    from perceiver.model import Perceiver
    from pipeline import multiworker
    from pipeline.settings.presets import PRESETS
    from pipeline.training.optimization import SmoothedCrossEntropy, optimizer

    preset = PRESETS[order["train"]]()
    keras.config.set_dtype_policy(preset.train.precision)
    own = order["batch"] // strategy.num_replicas_in_sync
    rng = np.random.default_rng(order["rank"])
    images = rng.integers(0, 256, (own, *preset.model.image_shape), dtype=np.uint8)
    labels = rng.integers(0, preset.model.num_classes, own, dtype=np.int32)
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat()
    models = {}
    for dtype in ("float32", "bfloat16"):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = Perceiver(**{name: getattr(preset.model, name) for name in preset.model.__dataclass_fields__})
            model.build((None, *preset.model.image_shape))
            model.compile(optimizer(preset.train, model, 1000), SmoothedCrossEntropy(preset.train.label_smoothing))
        multiworker.enable(model, gradient_dtype=dtype, check=False)
        models[dtype] = model
    found: dict[str, list[float]] = {dtype: [] for dtype in models}
    for turn in range(order["turns"] + 1):
        for dtype, model in models.items():
            data = multiworker.distribute(batches, strategy)
            model.fit(data, epochs=1, steps_per_epoch=1, verbose=0)  # traces, and opens the iterator
            start = time.perf_counter()
            model.fit(data, epochs=1, steps_per_epoch=order["steps"], verbose=0)
            if turn:
                found[dtype].append((time.perf_counter() - start) / order["steps"])
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
