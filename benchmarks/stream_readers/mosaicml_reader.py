"""MosaicML streaming: `StreamingDataset` over local MDS shards through its `StreamingDataLoader`."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from contest import BATCH_ROWS, SEED, Batches, run

# Its classes for images need torchvision, and PyPI's torchvision cannot be imported beside a torch for CPUs.
sys.modules["streaming.vision"] = ModuleType("streaming.vision")

# mypy takes `streaming` for the benchmark of that name.
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # type: ignore[attr-defined]  # noqa: E402


def write(images: np.ndarray, folder: Path, shards: int) -> None:
    rows = -(-len(images) // shards)
    columns = {"image": f"ndarray:uint8:{','.join(map(str, images.shape[1:]))}", "label": "int"}
    size_limit = rows * (images[0].nbytes + 64)  # with room for the heads of the rows
    with MDSWriter(out=str(folder), columns=columns, size_limit=size_limit) as writer:
        for row, image in enumerate(images):
            writer.write({"image": np.ascontiguousarray(image), "label": row})


def read(folder: Path, shape: tuple[int, ...], epoch: int, step: int) -> Batches:
    data = StreamingDataset(local=str(folder), batch_size=BATCH_ROWS, shuffle=True, shuffle_seed=SEED + epoch)
    loader = StreamingDataLoader(data, BATCH_ROWS, num_workers=0, drop_last=True, collate_fn=_collate)
    if step:
        loader.load_state_dict(
            {
                "epoch": 0,
                "sample_in_epoch": step * BATCH_ROWS,
                "num_canonical_nodes": 1,
                "shuffle_seed": SEED + epoch,
                "initial_physical_nodes": 1,
            }
        )
    yield from loader


def _collate(rows: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])


if __name__ == "__main__":
    run(write, read)
