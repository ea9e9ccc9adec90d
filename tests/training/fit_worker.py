"""One process of a training without Ray, started by test_fit.py. Its argument is JSON with its orders.

Checkpoints are kept below `out`; the training continues from the newest one.
"""

import json
import os
import signal
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
    from pipeline.data.shard_reader import ShardReader
    from pipeline.data.shards import write_rows
    from pipeline.data.streamed_rows import StreamedRows
    from pipeline.storage import Storage
    from pipeline.training.checkpoint_store import CheckpointStore
    from pipeline.training.config import TrainingConfig
    from pipeline.training.fit import fit
    from pipeline.training.own_model import OwnModel
    from pipeline.training.recorder import Recorder
    from pipeline.training.worker import Interrupted, Worker

    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)

    def rows(start: int, stop: int) -> Rows:
        return Rows(np.arange(start, stop), images[start:stop], labels[start:stop])

    def streamed(start: int, stop: int) -> StreamedRows:
        """The same rows, from shards of 25 with a window of six of them."""
        storage = Storage(orders["out"] + "-shards")
        shards = [write_rows(rows(at, min(at + 25, stop)), storage, f"{at}.parquet") for at in range(start, stop, 25)]
        return StreamedRows(ShardReader(storage), shards, (8, 8, 1), 6 * 25 * 64)

    requests: list[Callable[[], None]] = []
    reports = 0
    store = CheckpointStore(Storage(orders["out"]), "", kept=100)

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal reports
        reports += 1
        if folder is not None:
            store.commit(folder, metrics["epoch"], metrics.get("step", 0))
        if rank == orders.get("stop_rank") and reports == orders["stop_after"]:
            requests[0]()

    if rank == orders.get("kill_rank"):
        after_step = Recorder.on_train_batch_end

        def die_after_step(recorder: Recorder, batch: int, logs: dict[str, Any] | None = None) -> None:
            after_step(recorder, batch, logs)
            if [recorder.progress.epoch, recorder.progress.step] == orders["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

        Recorder.on_train_batch_end = die_after_step  # type: ignore[method-assign, assignment]

    checkpoint = Path(orders["out"]).with_name(f"resume-{os.getpid()}")
    worker = Worker(
        report=report,
        rank=rank,
        num_workers=len(addresses),
        resume_from=checkpoint if store.restore_newest(checkpoint) else None,
        on_stop=requests.append,
    )
    model: PerceiverConfig | OwnModel = PerceiverConfig(**orders["model"])
    if orders.get("own_model"):
        from own_models import convolutional

        model = OwnModel(convolutional, orders["own_model"], image_shape=(8, 8, 1), num_classes=10)
    train = TrainingConfig(**orders["train"])
    if train.deterministic:  # as `pipeline.workers.in_process.train_in_process` does
        tf.config.experimental.enable_op_determinism()
    try:
        # 101 validation rows in batches of 50: the last batch has one row, so that one of two workers gets none.
        opened = streamed if orders.get("streams") else rows
        fit(model, train, opened(0, 1000), opened(1000, 1101), worker, orders.get("class_counts"))
    except Interrupted:
        print("interrupted")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
