"""Decodes images of one's own, each once, into the verified Parquet files of `ingest`, with Ray Data.

The rows of a split are divided among the files in their order, and a task reads the images of one file and writes it;
`preprocess` shuffles them. The driver of the task holds names, labels and digests, and no pixels.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import PIL
import pyarrow as pa

from pipeline.data.collected_images import SplitFiles, alike_but_for_case
from pipeline.data.config import DatasetConfig
from pipeline.data.image_decoding import BACKGROUND
from pipeline.data.image_progress import ImageCounter, Report
from pipeline.data.image_rows import Decoding, check_failures, divided, listing_of
from pipeline.data.image_survey import count_duplicates
from pipeline.data.shards import from_table, write_rows
from pipeline.storage import Storage

_MOST_ROWS, _FILE_BYTES = 8192, 25 * 2**20
"""Rows of an output file, or fewer if their pixels are more than `_FILE_BYTES`."""
_WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}


def ingest_files(
    config: DatasetConfig, storage: Storage, out: str, say: Callable[[str], None], report: Report
) -> dict[str, Any]:
    """Writes the rows of `files` to Parquet files below `out`.

    Args:
        say: shows a warning.
        report: shows an `ImageProgress`.

    Returns:
        The manifest of `ingest`, also with `validation` among the `files` if the source has that split; `decoding`,
        how images were decoded, with a `resize` of None if all had one size and none was fitted; `coarse_of_class`, the
        coarse label of each class, if they have some; `corrupt`, name and problem of images that were left out; and
        `duplicates`, the number of images that two splits share.

    Raises:
        ValueError: if the files have changed since they were listed, also while they were read, or more than
            `max_corrupt` cannot be decoded.
    """
    listing, decoding = listing_of(config)
    splits = divided(config, listing)
    total = sum(map(len, splits.values()))
    records: dict[str, list[dict[str, Any]]] = {}
    progress = ImageCounter("ingest", "decoded", total, int(np.prod(decoding.image_shape)), report)
    for split, rows in splits.items():
        coarse = listing.coarse_of_class
        records[split] = _write_split(config, decoding, rows, coarse, storage, storage.join(out, split), progress)
    listing.check_unchanged()
    failures = [(f["name"], f["error"]) for split in splits for record in records[split] for f in record["failures"]]
    check_failures(config, listing, splits, sorted(failures), storage, storage.join(out, "corrupt.csv"))
    files = {split: _entries(records[split], storage, storage.join(out, f"{split}-renumbered")) for split in splits}
    keys = {s: np.concatenate([np.asarray(r["keys"], np.uint64) for r in records[s]]) for s in splits}
    duplicates = count_duplicates(keys)
    for pair, count in duplicates.items():
        say(f"warning: {count:,} images are the same in {pair}")
    if warning := alike_but_for_case(listing.label_names):
        say(warning)
    if left_out := listing.tree.left_out:
        reasons = "; ".join(f"{len(names):,}: {reason}" for reason, names in sorted(left_out.items()))
        say(f"{sum(map(len, left_out.values())):,} files left out (--dry-run names some): {reasons}")
    if failures:
        say(f"warning: {len(failures):,} of {total:,} images are left out, since they cannot be decoded")
    return {
        "source": config.source,
        "image_shape": list(decoding.image_shape),
        "num_classes": len(listing.label_names),
        "label_names": listing.label_names,
        "coarse_label_names": listing.coarse_label_names,
        "files": files,
        **({} if listing.coarse_of_class is None else {"coarse_of_class": listing.coarse_of_class.tolist()}),
        "decoding": {
            "resize": config.resize if config.image_size else None,
            "background": BACKGROUND,
            "pillow": PIL.__version__,
        },
        "corrupt": [list(failure) for failure in sorted(failures)],
        "duplicates": duplicates,
    }


def file_count(rows: int, image_shape: tuple[int, int, int]) -> int:
    """Number of files in which so many rows of a split are written."""
    per_file = max(1, min(_MOST_ROWS, _FILE_BYTES // int(np.prod(image_shape))))
    return -(-rows // per_file)


def _write_split(
    config: DatasetConfig,
    decoding: Decoding,
    rows: SplitFiles,
    coarse_of_class: np.ndarray | None,
    storage: Storage,
    out: str,
    progress: ImageCounter,
) -> list[dict[str, Any]]:
    """Writes the files of a split; returns what `_write` returns of each, in order."""
    import ray.data

    from pipeline.data.ray_rows import configured, own_errors

    ends = np.arange(0)
    if decoding.kind in ("parquet", "npz"):  # a task reads from one of these only
        ends = np.flatnonzero(np.array(rows.files[1:]) != np.array(rows.files[:-1])) + 1
    pieces = [
        part
        for piece in np.split(np.arange(len(rows)), ends)
        for part in np.array_split(piece, file_count(len(piece), decoding.image_shape))
    ]
    blocks = [_table(rows.take(piece), piece, number) for number, piece in enumerate(pieces)]
    dataset = configured(ray.data.from_arrow(blocks))
    decoded = dataset.map_batches(functools.partial(_decode, decoding=decoding), **_WHOLE_BLOCKS)
    write = functools.partial(_write, storage=storage, out=out, coarse_of_class=coarse_of_class)
    records = []
    with own_errors():
        written = decoded.map_batches(write, **_WHOLE_BLOCKS)
        for record in written.iter_rows():
            records.append(record)
            progress.add(len(record["keys"]))
    return sorted(records, key=lambda record: record["output"])


def _table(rows: SplitFiles, row_ids: np.ndarray, output: int) -> pa.Table:
    return pa.table(
        {
            "name": pa.array(rows.names, pa.string()),
            "file": pa.array(rows.files, pa.string()),
            "start": rows.starts,
            "size": rows.sizes,
            "label": rows.labels,
            "row_id": row_ids,
            "output": np.full(len(rows), output),
        }
    )


def _decode(rows: pa.Table, decoding: Decoding) -> pa.Table:
    """Adds the images, black where there is an error, the errors, and the keys of the contents."""
    wanted = SplitFiles(
        rows["name"].to_pylist(),
        rows["file"].to_pylist(),
        *(rows[column].to_numpy() for column in ("start", "size", "label")),
    )
    images = np.zeros((len(wanted), *decoding.image_shape), np.uint8)
    errors, keys = [], np.empty(len(wanted), np.uint64)
    for position, (image, error, key) in enumerate(decoding(wanted)):
        errors.append(error)
        keys[position] = key
        if image is not None:
            images[position] = image
    table = rows.select(["name", "label", "row_id", "output"])
    return (
        table.append_column("image", pa.FixedShapeTensorArray.from_numpy_ndarray(images))
        .append_column("error", pa.array(errors, pa.string()))
        .append_column("key", pa.array(keys))
    )


def _write(rows: pa.Table, storage: Storage, out: str, coarse_of_class: np.ndarray | None) -> pa.Table:
    """Writes the rows of one file that have an image; returns its entry, what failed, and all keys, as a row."""
    number = rows["output"][0].as_py()
    good = rows.filter(rows["error"].is_null())
    failed = rows.filter(rows["error"].is_valid())
    path = storage.join(out, f"{number:05d}.parquet")
    sha256 = ""
    if len(good):
        kept = from_table(good)
        coarse = None if coarse_of_class is None else coarse_of_class[kept.labels]
        sha256 = write_rows(replace(kept, coarse_labels=coarse), storage, path)["sha256"]
    record = {
        "output": number,
        "path": path,
        "rows": len(good),
        "sha256": sha256,
        "keys": rows["key"].to_numpy(),
        "failures": [{"name": f["name"], "error": f["error"]} for f in failed.select(["name", "error"]).to_pylist()],
        "failed_ids": failed["row_id"].to_numpy(),
    }
    schema = pa.schema(
        {
            "output": pa.int64(),
            "path": pa.string(),
            "rows": pa.int64(),
            "sha256": pa.string(),
            "keys": pa.list_(pa.uint64()),
            "failures": pa.list_(pa.struct({"name": pa.string(), "error": pa.string()})),
            "failed_ids": pa.list_(pa.int64()),
        }
    )
    return pa.Table.from_pylist([record], schema)


def _entries(records: list[dict[str, Any]], storage: Storage, out: str) -> list[dict[str, Any]]:
    """Manifest entries of the files; where rows failed, the others are numbered anew, so that no id is missing."""
    from pipeline.data.ray_rows import own_errors, read_files

    entries = [{name: record[name] for name in ("path", "rows", "sha256")} for record in records if record["rows"]]
    missing = np.sort(np.concatenate([np.asarray(record["failed_ids"], np.int64) for record in records]))
    if not len(missing):
        return entries
    renumber = functools.partial(_renumber, missing=missing, storage=storage, out=out)
    with own_errors():
        again = read_files(entries, storage).map_batches(renumber, **_WHOLE_BLOCKS).take_all()
    for entry in entries:
        storage.delete(entry["path"])
    return sorted(again, key=lambda entry: entry["path"])


def _renumber(rows: pa.Table, missing: np.ndarray, storage: Storage, out: str) -> pa.Table:
    found = from_table(rows)
    row_ids = found.row_ids - np.searchsorted(missing, found.row_ids)
    path = storage.join(out, f"from-{row_ids[0]:010d}.parquet")
    return pa.Table.from_pylist([write_rows(replace(found, row_ids=row_ids), storage, path)])
