"""One process of a training without Ray, started by tests/test_fit.py: reads its orders as JSON from its argument.

Rank 0 copies every checkpoint that is reported, and its metrics, to a folder of its own below `out`.
"""

import json
import os
import shutil
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
    from sklearn.datasets import load_digits

    from perceiver.config import PerceiverConfig
    from pipeline.batches import ImageArrays
    from pipeline.config import TrainingConfig
    from pipeline.fit import Interrupted, Worker, fit

    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)

    def rows(start: int, stop: int) -> ImageArrays:
        return ImageArrays(np.arange(start, stop), images[start:stop], labels[start:stop])

    requests: list[Callable[[], None]] = []
    reports = 0

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal reports
        reports += 1
        if folder is not None:
            target = Path(orders["out"]) / f"{reports:02d}"
            shutil.copytree(folder, target)
            (target / "metrics.json").write_text(json.dumps(metrics))
        if rank == orders.get("stop_rank") and reports == orders["stop_after"]:
            requests[0]()

    worker = Worker(
        report=report,
        rank=rank,
        num_workers=len(addresses),
        resume_from=Path(orders["resume_from"]) if orders.get("resume_from") else None,
        on_stop=requests.append,
    )
    model = PerceiverConfig(**orders["model"])
    train = TrainingConfig(**orders["train"])
    try:
        # 101 validation rows in batches of 50: the last batch has one row, so that one of two workers gets none.
        fit(model, train, rows(0, 1000), rows(1000, 1101), worker)
    except Interrupted:
        print("interrupted")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
