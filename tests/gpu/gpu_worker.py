"""One worker of a training on a GPU, started by test_gpu.py. Its argument is JSON with its orders.

It trains by the function that the workers of Ray Train and the trials use, with the GPU that CUDA_VISIBLE_DEVICES
names. Its last line is JSON: `history`, `device`, and `error` with the kind and the message if the training failed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(orders: dict[str, Any]) -> None:
    rank, addresses = orders["rank"], orders["addresses"]
    if len(addresses) > 1:
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    import numpy as np
    import tensorflow as tf
    from sklearn.datasets import load_digits

    from perceiver.config import PerceiverConfig
    from pipeline.data.rows import Rows
    from pipeline.devices import used_device
    from pipeline.storage import Storage
    from pipeline.training.checkpoint_store import STATE_FILE, CheckpointStore
    from pipeline.training.config import TrainingConfig
    from pipeline.training.worker import Worker
    from pipeline.workers.in_process import train_in_process
    from pipeline.workflow.task import StoppedEarly

    # GPUs since Ampere multiply float32 with 10 bits of mantissa otherwise, which no CPU does.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)

    def rows(start: int, stop: int) -> Rows:
        return Rows(np.arange(start, stop), images[start:stop], labels[start:stop])

    store = CheckpointStore(Storage(orders["out"]), "", kept=100)
    requests: list[Callable[[], None]] = []

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        if folder is not None:
            store.commit(folder, metrics["epoch"], metrics.get("step", 0))
        if metrics["epoch"] == orders.get("stop_after"):
            requests[0]()

    checkpoint = Path(orders["out"]).with_name(f"resume-{os.getpid()}")
    worker = Worker(
        report=report,
        rank=rank,
        num_workers=len(addresses),
        resume_from=checkpoint if store.restore_newest(checkpoint) else None,
        on_stop=requests.append,
    )
    result: dict[str, Any] = {}
    model, train = PerceiverConfig(**orders["model"]), TrainingConfig(**orders["train"])
    try:
        train_in_process(model, train, rows(0, 1000), rows(1000, 1101), worker)
    except StoppedEarly:
        result["stopped"] = True
    except Exception as error:
        result["error"] = [type(error).__name__, str(error)]
    found = Path(orders["out"]) / "newest"
    if store.restore_newest(found):
        result["history"] = json.loads((found / STATE_FILE).read_text())["history"]
    print(json.dumps(result | {"device": used_device()}), flush=True)
    os._exit(0)  # a worker whose peer has failed would wait for it


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
