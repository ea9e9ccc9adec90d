"""Which splits the workers stream from their shards, and the checks of that before they start."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.contact import check_path
from pipeline.data.order import MIB, fits_window
from pipeline.data.ray_rows import CorruptShardError
from pipeline.data.shard_cache import GB, ShardCache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.streamed_rows import StreamedRows
from pipeline.storage import Storage
from pipeline.training.config import TrainingConfig


def streamed_splits(manifest: dict[str, Any], config: TrainingConfig) -> list[str]:
    """Of `train` and `validation` those that do not fit the shuffle window.

    Where the training rows do not, the validation rows are streamed too: a worker's memory then follows from the window
    alone.
    """
    fits = {
        split: fits_window(manifest["splits"][split]["rows"], manifest["image_shape"], config.shuffle_window_mb)
        for split in ("train", "validation")
    }
    return [split for split, does in fits.items() if not (does and fits["train"])]


def streamed_rows(manifest: dict[str, Any], split: str, storage: Storage, config: TrainingConfig) -> StreamedRows:
    """The rows of a split, read from its shards as they are needed."""
    height, width, channels = manifest["image_shape"]
    shards = manifest["splits"][split]["shards"]
    cache = None
    if config.cache is not None:
        wanted = frozenset(shard["sha256"] for part in manifest["splits"].values() for shard in part["shards"])
        cache = ShardCache(Path(config.cache).expanduser(), config.cache_gb * GB, wanted)
    return StreamedRows(ShardReader(storage, cache), shards, (height, width, channels), config.shuffle_window_mb * MIB)


def check_streams(manifest: dict[str, Any], splits: Sequence[str], storage: Storage, config: TrainingConfig) -> None:
    """Checks what can be known before the first shard is read.

    Raises:
        CorruptShardError: if a shard is missing.
        ValueError: if the window or the cache is too small for the shards, which names the size that would do, or the
            folder of the cache does not answer.
    """
    height, width, channels = manifest["image_shape"]
    if splits and config.cache is not None:
        check_path(config.cache, "train.cache")  # on this host; those of the workers are asked when they train
    for split in splits:
        rows, shards = streamed_rows(manifest, split, storage, config), manifest["splits"][split]["shards"]
        if split == "train":
            rows.order(config.global_batch_size, config.seed)
        largest = max(shard["rows"] for shard in shards) * height * width * channels
        if config.cache is not None and largest > config.cache_gb * GB:
            raise ValueError(
                f"train.cache_gb = {config.cache_gb:g} is less than a shard of {split} has, up to {largest:,} bytes: "
                f"give at least {largest / GB:.3g}, or leave out train.cache"
            )
        folders = {shard["path"].rpartition("/")[0] for shard in shards}
        found = {Storage.join(folder, name) for folder in folders for name in storage.list(folder)}
        for shard in shards:
            if shard["path"] not in found:
                raise CorruptShardError(storage.absolute(shard["path"]), shard["sha256"], None)
