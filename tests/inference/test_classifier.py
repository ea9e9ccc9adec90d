"""The actor of batch inference, without Ray."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from image_models import IMAGE_SHAPE, LABEL_NAMES

from pipeline.inference.classifier import Classifier, file_name, packed
from pipeline.storage import Storage

PARTS = 4


class SlowStorage(Storage):
    """A storage whose writes take until another part is being classified, if one is left."""

    begun = written = 0
    changed = threading.Condition()

    def begin(self) -> None:
        with self.changed:
            self.begun += 1
            self.changed.notify_all()

    def write_bytes(self, path: str, data: bytes) -> None:
        with self.changed:
            self.written += 1
            wanted = min(self.written + 1, PARTS)
            assert self.changed.wait_for(lambda: self.begun >= wanted, timeout=60), "the write held up the next part"
        super().write_bytes(path, data)


def test_a_part_is_classified_while_another_is_written(tmp_path: Path) -> None:
    storage = SlowStorage(str(tmp_path))
    at_once, alone = threading.Semaphore(1), []

    def apply(images: np.ndarray) -> np.ndarray:
        alone.append(at_once.acquire(blocking=False))
        storage.begin()
        time.sleep(0.05)
        at_once.release()
        return np.tile(np.eye(len(LABEL_NAMES), dtype=np.float32)[1], (len(images), 1))

    classifier = Classifier.__new__(Classifier)  # without a model, whose load is tested with Ray
    vars(classifier).update(_apply=apply, _names=LABEL_NAMES, _remedy="", _output=storage, _batch_size=8)
    vars(classifier).update(_device="none", _turn=threading.Lock(), _error=None)

    def part(number: int) -> pa.Table:
        images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((4, *IMAGE_SHAPE), np.uint8))
        ids = np.arange(4 * number, 4 * number + 4)
        rest = {"row_id": ids, "name": ids.astype(str), "error": pa.nulls(4, pa.string()), "part": [number] * 4}
        return packed(pa.table({"image": images, **rest}))

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(classifier, [part(number) for number in range(PARTS)]))
    assert alone == [True] * PARTS, "the model computes one part at a time"
    assert [row["rows"][0].as_py() for row in done] == [4] * PARTS
    for number, row in enumerate(done):
        written = pq.read_table(tmp_path / file_name(number))
        assert written["row_id"].to_pylist() == list(range(4 * number, 4 * number + 4))
        assert set(written["class_index"].to_pylist()) == {1}
        assert (tmp_path / file_name(number)).stat().st_mtime <= row["ended"][0].as_py(), "counted when it is written"
