"""What a dry run says of images of one's own, from their names and headers."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.data.collected_images import alike_but_for_case
from pipeline.data.config import DatasetConfig
from pipeline.data.image_ingest import file_count
from pipeline.data.image_rows import divided
from pipeline.data.image_survey import find_duplicates, read_headers, sizes_seen
from pipeline.data.labelled_images import list_images
from pipeline.masking import mask
from pipeline.storage import Storage

_MOST_CLASSES, _NAMED = 40, 3


def show_images(data: DatasetConfig, storage: Storage, console: Console) -> None:
    """Prints the classes and what is noteworthy of the images of `files`; reads no more than headers, as a rule."""
    assert data.path is not None
    assert data.found is not None
    listing = list_images(data.path)
    headers = read_headers(listing, storage, keep=False, max_pixels=data.max_pixels)
    splits = divided(data, listing)
    counts = {split: np.bincount(rows.labels, minlength=len(listing.label_names)) for split, rows in splits.items()}
    classes = Table("class", *counts, title="images")
    for number, name in enumerate(listing.label_names[:_MOST_CLASSES]):
        classes.add_row(escape(name), *(f"{count[number]:,}" for count in counts.values()))
    if (left := len(listing.label_names) - _MOST_CLASSES) > 0:
        rest = [count[_MOST_CLASSES:] for count in counts.values()]
        classes.add_row(f"{left:,} others", *(f"{count.min():,} to {count.max():,} each" for count in rest))
    classes.add_row("all", *(f"{count.sum():,}" for count in counts.values()))
    console.print(classes)
    smallest, median, largest = sizes_seen(headers)
    height, width, channels = data.found.image_shape
    total = sum(map(len, splits.values()))
    files = sum(file_count(len(rows), data.found.image_shape) for rows in splits.values())
    taken = " and ".join(
        f"{share:.0%} of train for {split}"
        for split, share in (("test", data.test_fraction), ("validation", data.validation_fraction))
        if split not in listing.splits
    )
    fitted = "" if len(headers.sizes) == 1 and (width, height) in headers.sizes else f", by {data.resize}"
    lines = [
        f"path: {data.path} ({listing.kind})",
        f"splits: {', '.join(listing.splits)} in the source" + (f"; taken by the settings: {taken}" if taken else ""),
        f"sizes: smallest {smallest}, median {median}, largest {largest} pixels; {headers.grey:,} grey, "
        f"{headers.colored:,} in colour",
        f"made: {total:,} images of {width} x {height} x {channels}{fitted}, {total * height * width * channels:,} "
        f"bytes of pixels in {files:,} files, from {listing.bytes:,} bytes; {data.num_shards} training shards",
        _some("cannot be decoded, by their headers", [f"{name} ({why})" for name, why in headers.corrupt]),
        *(_some(f"left out, {reason}", names) for reason, names in sorted(listing.tree.left_out.items())),
        _shared(find_duplicates(listing)),
        *filter(None, [alike_but_for_case(listing.label_names)]),
    ]
    for line in lines:
        console.print(escape(mask(line)))


def _some(what: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    return f"{what}: {len(names):,}" + (f", {', '.join(names[:_NAMED])}{more}" if names else "")


def _shared(duplicates: Mapping[str, int]) -> str:
    found = ", ".join(f"{count:,} in {pair}" for pair, count in duplicates.items())
    return f"warning: the same images are in two splits: {found}" if found else "the same image in two splits: 0"
