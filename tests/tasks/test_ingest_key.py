"""When the rows that an earlier run has ingested from one's own images are those that a command asks for."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.config import DatasetConfig, FoundImages
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run

FOUND = FoundImages("folders", "f", (16, 16, 3), 2, train_rows=18, validation_rows=0, test_rows=0)
FILES = DatasetConfig("files", path="images", fingerprint="f", image_size=16, found=FOUND)


def run(data: DatasetConfig, storage: Storage) -> Run[Any]:
    return Run(TASKS[:2], SimpleNamespace(data=data), storage)


@pytest.fixture
def storage(tmp_path: Any) -> Storage:
    """A storage in which `ingest` is done, with two images left out."""
    storage = Storage(str(tmp_path))
    first = run(replace(FILES, max_corrupt=2), storage)
    output = {"files": {}, "corrupt": [["a.png", "is cut off"], ["b.png", "is cut off"]]}
    manifest = {"task": "ingest", "attempt": "a", "inputs": {}, "output": output}
    storage.write_json(first.manifest_path("ingest"), manifest)
    return storage


def test_a_command_that_accepts_as_many_corrupt_images_takes_the_rows(storage: Storage) -> None:
    assert "ingest" in run(replace(FILES, max_corrupt=2), storage).done()
    assert "ingest" in run(replace(FILES, max_corrupt=5), storage).done()


def test_one_that_accepts_fewer_does_not(storage: Storage) -> None:
    assert not run(replace(FILES, max_corrupt=1), storage).done()
    assert not run(FILES, storage).done()


def test_one_that_decodes_larger_images_does_not(storage: Storage) -> None:
    assert not run(replace(FILES, max_corrupt=2, max_pixels=5000), storage).done()


def test_rows_from_before_long_images_were_padded_rightly_are_not_taken() -> None:
    section = TASKS[0].section
    padded, cropped = (section(SimpleNamespace(data=replace(FILES, resize=kind))) for kind in ("pad", "crop"))  # type: ignore[arg-type]
    assert padded["pad"] == 2
    assert "pad" not in cropped, "what was ingested otherwise stays done"
