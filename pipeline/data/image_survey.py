"""Looks at the headers of all images at `data.path`, and refuses what could not be trained, before anything is started.

The pixels are decoded by `ingest` alone; a file whose header is whole may still prove corrupt there.
"""

import contextlib
import csv
import hashlib
import io
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL

from pipeline.data.config import MAX_PIXELS, DatasetConfig, FoundImages
from pipeline.data.image_containers import HEAD_BYTES, read_heads, read_images
from pipeline.data.image_decoding import Header, ImageError, most_bytes, read_header
from pipeline.data.labelled_images import Listing, list_images
from pipeline.data.npz_files import NpzImages
from pipeline.storage import Storage, open_storage

_SAY_SECONDS = 5.0
_NAMED = 3
"""Names of classes or files in a message."""
Corrupt = Sequence[tuple[str, str]]
"""Name of each image that cannot be used, and why."""


@dataclass(frozen=True)
class Headers:
    """What the headers of all images say.

    Attributes:
        corrupt: images that cannot be used, as far as their headers show it.
        sizes: how many images are of each width and height.
        grey, colored: how many images are grey, and how many in colour.
    """

    corrupt: Corrupt
    sizes: Counter[tuple[int, int]]
    grey: int
    colored: int


_READ: dict[tuple[str, int], Headers] = {}
"""The headers of the last listing, by its fingerprint and `max_pixels`: a dry run asks twice."""
SURVEYS = ".surveys"
"""Folder of the storage with what the headers of each listing say, by its fingerprint.

It is hidden, so that no listing has it: the storage may lie at `data.path`.
"""


def read_headers(listing: Listing, storage: Storage, keep: bool, max_pixels: int = MAX_PIXELS) -> Headers:
    """What the headers of all images say; prints its progress to standard error if reading them takes long.

    What an earlier command has kept in `storage` holds as long as names, sizes and times of the files do. With `keep`
    the result is kept there.
    """
    key = (listing.fingerprint, max_pixels)
    if key not in _READ:
        _READ.clear()
        other = "" if max_pixels == MAX_PIXELS else f"-{max_pixels}"
        path = f"{SURVEYS}/{listing.fingerprint}{other}.json"
        found = _kept(storage, path)
        if found is None:
            found = _read_headers(listing, max_pixels)
            if keep:
                with contextlib.suppress(OSError):  # whatever is wrong with the storage is said where it is needed
                    storage.write_json(path, _to_json(found))
        _READ[key] = found
    return _READ[key]


def _kept(storage: Storage, path: str) -> Headers | None:
    """What an earlier command with the same Pillow has found, if it is there and whole."""
    try:
        kept = storage.read_json(path)
        if kept["pillow"] != PIL.__version__:
            return None
        sizes = Counter({(width, height): count for width, height, count in kept["sizes"]})
        return Headers([(name, why) for name, why in kept["corrupt"]], sizes, kept["grey"], kept["colored"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_json(headers: Headers) -> dict[str, Any]:
    return {
        "pillow": PIL.__version__,
        "corrupt": [list(found) for found in headers.corrupt],
        "sizes": [[width, height, count] for (width, height), count in headers.sizes.items()],
        "grey": headers.grey,
        "colored": headers.colored,
    }


def _read_headers(listing: Listing, max_pixels: int) -> Headers:
    corrupt: list[tuple[str, str]] = []
    found: Counter[Header] = Counter()
    root, total, done, said = listing.tree.root, sum(map(len, listing.splits.values())), 0, time.monotonic()
    for rows in listing.splits.values():
        if listing.kind == "npz":
            for file, count in Counter(rows.files).items():
                with NpzImages(root, file) as images:
                    _, height, width, *channels = images.shape
                if width * height > max_pixels:
                    raise ValueError(
                        f"data.max_pixels = {max_pixels}: the images of {root.absolute(file)} have {width} x {height}: "
                        "give a higher number"
                    )
                found[Header(width, height, channels != [3])] += count
            continue
        for position, open_head in enumerate(read_heads(root, listing.kind, rows)):
            try:
                try:
                    with open_head() as head:
                        found[read_header(head, max_pixels)] += 1
                except ImageError:
                    if rows.sizes[position] <= HEAD_BYTES:
                        raise
                    # Of a large file perhaps only the beginning was read, which may have been too little.
                    only = rows.take(np.array([position]))
                    (data,) = read_images(root, listing.kind, only, most_bytes(max_pixels))
                    found[read_header(io.BytesIO(bytes(data if data is not None else b"")), max_pixels)] += 1
            except ImageError as error:
                corrupt.append((rows.names[position], str(error)))
            done += 1
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                print(f"looking at the images: {done:,} of {total:,}", file=sys.stderr)
    sizes: Counter[tuple[int, int]] = Counter()
    for header, count in found.items():
        sizes[header.width, header.height] += count
    grey = sum(count for header, count in found.items() if header.is_grey)
    return Headers(corrupt, sizes, grey, found.total() - grey)


def find_images(config: DatasetConfig, storage: str, keep_survey: bool = True) -> DatasetConfig:
    """`config` of `files` with `found` filled in.

    Args:
        storage: folder or URI where the list of corrupt images is put if there are too many.
        keep_survey: whether what the headers say is kept there too, for the next command.

    Raises:
        ValueError: if the images cannot be used as `config` says; names the option and the remedy.
    """
    assert config.path is not None
    place, listing = open_storage(storage), list_images(config.path)
    check_classes(listing, {split: np.bincount(r.labels, minlength=1) for split, r in listing.splits.items()})
    headers = read_headers(listing, place, keep_survey, config.max_pixels)
    check_corrupt(config, headers.corrupt, sum(map(len, listing.splits.values())), place, "corrupt.csv")
    if not headers.sizes:
        raise ValueError(
            f"data.path = {config.path!r}: none of the images can be used: mend them, or give another folder"
        )
    if config.sha256 is not None:
        _check_content(config.sha256, listing)
    rows = {split: len(files) for split, files in listing.splits.items()}
    found = FoundImages(
        kind=listing.kind,
        fingerprint=listing.fingerprint,
        image_shape=_image_shape(config, headers),
        num_classes=len(listing.label_names),
        train_rows=rows["train"],
        validation_rows=rows.get("validation", 0),
        test_rows=rows.get("test", 0),
    )
    return replace(config, found=found, fingerprint=found.fingerprint if config.sha256 is None else None)


def check_classes(listing: Listing, counts: dict[str, np.ndarray]) -> None:
    """Checks that every class has training images, and every split some.

    Args:
        counts: images of each class, by split.

    Raises:
        ValueError: if not; names classes.
    """
    names = listing.label_names
    counts = {split: np.pad(count, (0, len(names) - len(count))) for split, count in counts.items()}
    empty = np.flatnonzero(counts["train"] == 0)
    for split, count in counts.items():
        if lacking := [names[i] for i in empty if count[i]]:
            raise ValueError(
                f"data.path = {listing.path!r}: {len(lacking)} classes have images in {split} and none in train, "
                f"such as {', '.join(lacking[:_NAMED])}: add them, or move these away"
            )
    if len(empty):
        raise ValueError(
            f"data.path = {listing.path!r}: {len(empty)} of {len(names)} classes have no images, such as "
            f"{', '.join(names[i] for i in empty[:_NAMED])}: add them, or number the others from 0 without a gap"
        )
    if without := [split for split, count in counts.items() if not count.any()]:
        raise ValueError(
            f"data.path = {listing.path!r}: no image of {without[0]} can be used: mend them, or move them away"
        )
    if len(names) < 2:
        raise ValueError(f"data.path = {listing.path!r} has one class, {names[0]!r}: there is nothing to tell apart")


def check_corrupt(config: DatasetConfig, corrupt: Corrupt, total: int, storage: Storage, path: str) -> None:
    """Checks that no more images are corrupt than the user allows; else writes the list of them to `path`.

    Raises:
        ValueError: if there are more.
    """
    if len(corrupt) <= config.max_corrupt:
        return
    text = io.StringIO()
    csv.writer(text).writerows([("file_name", "problem"), *corrupt])
    try:
        storage.write_bytes(path, text.getvalue().encode())
        listed = f"the list is in {storage.absolute(path)}"
    except OSError as error:
        listed = f"the list cannot be written to {storage.absolute(path)} ({error})"
    name, why = corrupt[0]
    raise ValueError(
        f"data.max_corrupt = {config.max_corrupt}: {len(corrupt):,} of {total:,} images cannot be used, first {name}, "
        f"which {why}; {listed}: mend them, or give --data.max-corrupt {len(corrupt)} "
        "to leave them out"
    )


def _image_shape(config: DatasetConfig, headers: Headers) -> tuple[int, int, int]:
    channels = config.channels or (3 if headers.colored else 1)
    if config.channels is None and headers.grey and headers.colored:
        raise ValueError(
            f"data.channels = None: {headers.grey:,} images are grey and {headers.colored:,} in colour: give "
            "--data.channels 3, or 1 to make all grey"
        )
    if config.image_size is not None:
        return config.image_size, config.image_size, channels
    if len(headers.sizes) != 1:
        smallest, median, largest = sizes_seen(headers)
        raise ValueError(
            f"data.image_size = None: the images are of {len(headers.sizes):,} sizes from {smallest} to {largest}, "
            f"median {median}: give --data.image-size, the side in pixels to which all are fitted"
        )
    ((width, height),) = headers.sizes
    return height, width, channels


def sizes_seen(headers: Headers) -> tuple[str, str, str]:
    """The smallest, median and largest size by number of pixels, as `width x height`."""
    ordered = sorted(headers.sizes, key=lambda size: (size[0] * size[1], size))
    reached = np.cumsum([headers.sizes[size] for size in ordered])
    middle = ordered[int(np.searchsorted(reached, reached[-1] / 2))]
    smallest, median, largest = (f"{width} x {height}" for width, height in (ordered[0], middle, ordered[-1]))
    return smallest, median, largest


def content_key(data: bytes | np.ndarray | None) -> int:
    """The first 8 bytes of the SHA-256 of an image, to find the same image in two splits."""
    content = data.tobytes() if isinstance(data, np.ndarray) else data or b""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def count_duplicates(keys: dict[str, np.ndarray]) -> dict[str, int]:
    """How many images of two splits have the same `content_key`, by the names of the two, such as `train and test`."""
    names, found = list(keys), {}
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            if same := len(np.intersect1d(keys[first], keys[second])):
                found[f"{first} and {second}"] = same
    return found


def find_duplicates(listing: Listing) -> dict[str, int]:
    """`count_duplicates` of the splits that the source has; reads the images whose size in bytes is that of another."""
    sizes = [np.unique(rows.sizes) for rows in listing.splits.values()]
    often, count = np.unique(np.concatenate(sizes), return_counts=True)
    read = {}
    for split, rows in listing.splits.items():
        alike = rows.take(np.flatnonzero(np.isin(rows.sizes, often[count > 1])))
        images = read_images(listing.tree.root, listing.kind, alike)
        read[split] = np.fromiter(map(content_key, images), np.uint64, len(alike))
    return count_duplicates(read)


def _check_content(sha256: str, listing: Listing) -> None:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"data.sha256 = {sha256!r}: must be 64 hexadecimal digits")
    content = hashlib.sha256()
    for name in listing.files:
        content.update(f"{name}\0".encode() + hashlib.sha256(listing.tree.root.read_bytes(name)).digest())
    if (found := content.hexdigest()) != sha256.lower():
        raise ValueError(
            f"data.sha256 = {sha256!r}: the files at {listing.path} have the SHA-256 {found}; give this one if they "
            "are those that you mean"
        )
