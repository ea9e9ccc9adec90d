"""The actor of batch inference, without Ray."""

import threading
import time
from collections.abc import Callable
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


def part(number: int) -> pa.Table:
    """A part of four images, packed."""
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((4, *IMAGE_SHAPE), np.uint8))
    ids = np.arange(4 * number, 4 * number + 4)
    rest = {"row_id": ids, "name": ids.astype(str), "error": pa.nulls(4, pa.string()), "part": [number] * 4}
    return packed(pa.table({"image": images, **rest}))


def actor(apply: Callable[[np.ndarray], np.ndarray], storage: Storage) -> Classifier:
    """An actor whose model is `apply`; the load of a real one is tested with Ray."""
    made = Classifier.__new__(Classifier)
    vars(made).update(_apply=apply, _names=LABEL_NAMES, _remedy="", _output=storage, _batch_size=8)
    vars(made).update(_device="none", _turn=threading.Lock(), _error=None)
    return made


def test_an_image_without_finite_probabilities_has_an_error_and_no_class(tmp_path: Path) -> None:
    probabilities = np.tile(np.eye(len(LABEL_NAMES), dtype=np.float32)[1], (4, 1))
    probabilities[2, 0] = np.nan
    done = actor(lambda images: probabilities, Storage(str(tmp_path)))(part(0))
    assert done["errors"].to_pylist() == [1]
    written = pq.read_table(tmp_path / file_name(0))
    assert written["class_index"].to_pylist() == [1, 1, None, 1]
    assert written["probabilities"].to_pylist()[2] is None
    assert written["error"].to_pylist() == [None, None, "the model gives it no finite probabilities", None]


def test_a_part_is_classified_while_another_is_written(tmp_path: Path) -> None:
    storage = SlowStorage(str(tmp_path))
    at_once, alone = threading.Semaphore(1), []

    def apply(images: np.ndarray) -> np.ndarray:
        alone.append(at_once.acquire(blocking=False))
        storage.begin()
        time.sleep(0.05)
        at_once.release()
        return np.tile(np.eye(len(LABEL_NAMES), dtype=np.float32)[1], (len(images), 1))

    classifier = actor(apply, storage)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(classifier, [part(number) for number in range(PARTS)]))
    assert alone == [True] * PARTS, "the model computes one part at a time"
    assert [row["rows"][0].as_py() for row in done] == [4] * PARTS
    for number, row in enumerate(done):
        written = pq.read_table(tmp_path / file_name(number))
        assert written["row_id"].to_pylist() == list(range(4 * number, 4 * number + 4))
        assert set(written["class_index"].to_pylist()) == {1}
        assert (tmp_path / file_name(number)).stat().st_mtime <= row["ended"][0].as_py(), "counted when it is written"
