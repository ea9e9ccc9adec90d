"""The actor of batch inference, without Ray."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_models import IMAGE_SHAPE, LABEL_NAMES

from pipeline.inference.claim import DIGEST_KEY, claim, digest_of, file_name
from pipeline.inference.classifier import Classifier, count_errors, packed
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


def actor(apply: Callable[[np.ndarray], np.ndarray], storage: Storage, job: dict[str, Any] | None = None) -> Classifier:
    """An actor whose model is `apply`; the load of a real one is tested with Ray."""
    made = Classifier.__new__(Classifier)
    vars(made).update(_apply=apply, _names=LABEL_NAMES, _remedy="", _output=storage, _batch_size=8)
    vars(made).update(_device="none", _turn=threading.Lock(), _error=None, _job=job)
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


def middle(images: np.ndarray) -> np.ndarray:
    return np.tile(np.eye(len(LABEL_NAMES), dtype=np.float32)[1], (len(images), 1))


def test_of_two_jobs_that_claim_an_output_at_once_one_writes(tmp_path: Path) -> None:
    """Both found it empty; the second then overwrites the mark of the first, which had written nothing."""
    storage, (first, second) = Storage(str(tmp_path)), ({"model": {"uri": f"models:/m/{n}"}} for n in (1, 2))
    claim(storage, first)
    claim(storage, second)
    with pytest.raises(ValueError, match=rf"^output = '{tmp_path}': another job has begun to write there: give the"):
        actor(middle, storage, first)(part(0))
    assert not (tmp_path / file_name(0)).exists()
    actor(middle, storage, second)(part(0))
    assert pq.read_metadata(tmp_path / file_name(0)).metadata[DIGEST_KEY] == digest_of(second)
    assert count_errors(storage, second, [0]) == 0
    (tmp_path / "_job.json").unlink()
    with pytest.raises(ValueError, match=r"_job\.json is gone or cannot be read: give the command again with another"):
        actor(middle, storage, second)(part(1))


def test_a_part_of_another_job_is_found_at_the_end(tmp_path: Path) -> None:
    storage, (first, second) = Storage(str(tmp_path)), ({"model": {"uri": f"models:/m/{n}"}} for n in (1, 2))
    claim(storage, first)
    actor(middle, storage, first)(part(1))
    storage.write_json("_job.json", second)  # it had looked for parts before
    actor(middle, storage, second)(part(0))
    message = rf"^output = '{tmp_path}': another job, which began at the same time, wrote part-000001\.parquet: give"
    with pytest.raises(ValueError, match=message):
        count_errors(storage, second, [0, 1])
    actor(middle, storage)(part(1))  # as earlier versions wrote it
    assert count_errors(storage, second, [0, 1]) == 0
