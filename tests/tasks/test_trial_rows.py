"""The rows of trials in one process: a sample of what does not fit the shuffle window, or an error with the remedy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.rows import Rows
from pipeline.data.shards import write_rows
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks.search import run_search, trial_rows
from pipeline.workflow.channel import Channel
from pipeline.workflow.task import Context

pytestmark = pytest.mark.usefixtures("ray_cluster")
COUNT = 400  # rows of 4 KiB


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def manifest(storage: Storage) -> dict[str, Any]:
    """1.6 MiB of training and of validation rows, in shards of 50 rows."""
    random = np.random.default_rng(0)
    splits = {}
    for split in ("train", "validation"):
        rows = Rows.of(random.integers(0, 256, (COUNT, 64, 64, 1), np.uint8), np.arange(COUNT, dtype=np.int32) % 10)
        parts = np.array_split(random.permutation(COUNT), 8)
        shards = [
            write_rows(rows.take(part), storage, f"{split}/{number}.parquet") for number, part in enumerate(parts)
        ]
        splits[split] = {"rows": COUNT, "digest": split, "shards": shards}
    return {"image_shape": [64, 64, 1], "splits": splits}


def context(storage: Storage, manifest: dict[str, Any], window_mb: int, **search: Any) -> Context:
    config = quickstart()
    config = replace(
        config,
        train=replace(config.train, shuffle_window_mb=window_mb, global_batch_size=50),
        search=replace(config.search, **search),
    )
    return Context(config, storage, "key", {}, {"preprocess": manifest}, "out", "state/key/state", "run", Channel())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_sample_is_the_same_in_memory_and_from_shards(storage: Storage, manifest: dict[str, Any], split: str) -> None:
    sample = {"train_rows": 100, "validation_rows": 100}
    in_memory = trial_rows(context(storage, manifest, 2, **sample), split)
    streamed = trial_rows(context(storage, manifest, 1, **sample), split)
    assert len(in_memory) == 100
    for name in ("row_ids", "images", "labels"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(in_memory, name))


def test_all_rows_that_do_not_fit_are_refused_with_the_number_that_does(
    storage: Storage, manifest: dict[str, Any]
) -> None:
    made = context(storage, manifest, 1, train_rows=100)
    space = made.config.search_space()
    assert space is not None
    with pytest.raises(
        ValueError, match=r"search\.validation_rows = 0, .* 400 rows .* --search.validation-rows 256, or"
    ):
        run_search(made, space)
