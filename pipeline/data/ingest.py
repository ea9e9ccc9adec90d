"""Writes the verified rows of a source to Parquet files."""

from collections.abc import Callable
from typing import Any

from pipeline.data.config import DatasetConfig
from pipeline.data.download import check_archive
from pipeline.data.image_progress import Report
from pipeline.data.rows import RawDataset, Rows
from pipeline.data.shards import write_rows
from pipeline.data.sources import source_of
from pipeline.storage import Storage

_ROWS_PER_FILE = 8192
"""Rows of a file: 25 MB of CIFAR, and enough files for as many readers."""


def load(config: DatasetConfig) -> RawDataset:
    """Reads, decodes and verifies a whole data set into memory.

    Raises:
        ValueError: as `check_archive`, if the archive cannot be read or downloaded, or if the data are not what the
            source promises; names expected and found.
    """
    source = source_of(config)
    check_archive(config, source)
    return source.load(config, source)


def ingest(
    config: DatasetConfig,
    storage: Storage,
    out: str,
    say: Callable[[str], None] = lambda line: None,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """Writes the verified rows of a source to Parquet files below `out`.

    Args:
        config: Names the source.
        storage: Where the files go.
        out: Storage prefix of the files.
        say: Shows a warning.
        report: Shows an `ImageProgress`, where it may take long.

    Returns:
        Manifest: `source`, `image_shape`, `num_classes`, `label_names`, `coarse_label_names`, and `files`, which has
        for `train` and `test` a list of `{path, rows, sha256}` with paths relative to the root of the storage.
        `image_ingest.ingest_files` says what it has besides for images of one's own.

    Raises:
        ValueError: as `load`.
    """
    if config.source == "files":
        from pipeline.data.image_ingest import ingest_files

        return ingest_files(config, storage, out, say, report)
    source, raw = source_of(config), load(config)
    return {
        "source": source.name,
        "image_shape": list(source.image_shape),
        "num_classes": source.num_classes,
        "label_names": raw.label_names,
        "coarse_label_names": raw.coarse_label_names,
        "files": {
            "train": _write_files(raw.train, storage, storage.join(out, "train")),
            "test": _write_files(raw.test, storage, storage.join(out, "test")),
        },
    }


def _write_files(split: Rows, storage: Storage, out: str) -> list[dict[str, Any]]:
    files = []
    for number, start in enumerate(range(0, len(split), _ROWS_PER_FILE)):
        rows = split.take(slice(start, start + _ROWS_PER_FILE))
        files.append(write_rows(rows, storage, storage.join(out, f"{number:05d}.parquet")))
    return files
