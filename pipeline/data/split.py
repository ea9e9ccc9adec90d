"""Opens a split in memory if it fits the shuffle window, else with its pixels in the shards."""

from typing import Any

from pipeline.data.order import fits_window
from pipeline.data.ray_rows import materialize_split, to_rows
from pipeline.data.rows import Rows
from pipeline.data.shard_reader import ShardReader
from pipeline.data.sharded_rows import ShardedRows
from pipeline.storage import Storage


def open_split(manifest: dict[str, Any], split: str, storage: Storage, window_mb: int) -> Rows | ShardedRows:
    """All rows of a split in order of `row_ids`.

    Args:
        manifest: Output of `preprocess`.
        split: `train`, `validation` or `test`.
        storage: Where the shards are.
        window_mb: `train.shuffle_window_mb`, in MiB.

    Raises:
        CorruptFileError: if a shard is missing or has other bytes.
    """
    height, width, channels = manifest["image_shape"]
    described = manifest["splits"][split]
    if fits_window(described["rows"], manifest["image_shape"], window_mb):
        return to_rows(materialize_split(manifest, split, storage))
    return ShardedRows(ShardReader(storage), described["shards"], (height, width, channels))
