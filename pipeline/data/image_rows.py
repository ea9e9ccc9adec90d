"""From the images at `data.path` to rows: which split each belongs to, how each is decoded, and all in memory.

`image_ingest.py` does the same with Ray Data and holds no pixels; `pipeline.evaluate_version` needs no Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.collected_images import SplitFiles
from pipeline.data.config import MAX_PIXELS, DatasetConfig
from pipeline.data.image_containers import Encoded, read_images
from pipeline.data.image_decoding import ImageError, Resize, decode, fit_array, most_bytes
from pipeline.data.image_survey import Corrupt, check_classes, check_corrupt, content_key
from pipeline.data.labelled_images import Listing, list_images
from pipeline.data.rows import RawDataset, Rows, stratified_split
from pipeline.storage import Storage


@dataclass(frozen=True)
class Decoding:
    """How images become rows; goes to all tasks."""

    root: Storage
    kind: str
    image_shape: tuple[int, int, int]
    resize: Resize
    max_pixels: int = MAX_PIXELS

    def decode(self, encoded: Encoded) -> np.ndarray:
        if encoded is None:
            raise ImageError("is missing")
        if isinstance(encoded, bytes):
            return decode(encoded, self.image_shape, self.resize, self.max_pixels)
        return fit_array(encoded, self.image_shape, self.resize, self.max_pixels)

    def __call__(self, rows: SplitFiles) -> Iterator[tuple[np.ndarray | None, str | None, int]]:
        """For each row its image, or why there is none, and its `content_key`."""
        for encoded in read_images(self.root, self.kind, rows, most_bytes(self.max_pixels)):
            try:
                yield self.decode(encoded), None, content_key(encoded)
            except ImageError as error:
                yield None, str(error), content_key(encoded)


def listing_of(config: DatasetConfig) -> tuple[Listing, Decoding]:
    """The images of `config`, which were found before, and how they become rows.

    Raises:
        ValueError: if they have changed since.
    """
    assert config.path is not None
    assert config.found is not None
    listing = list_images(config.path)
    if listing.fingerprint != config.found.fingerprint:
        raise ValueError(f"data.path = {config.path!r} has changed since it was listed: give the command again")
    shape = config.found.image_shape
    return listing, Decoding(listing.tree.root, listing.kind, shape, config.resize, config.max_pixels)


def divided(config: DatasetConfig, listing: Listing) -> dict[str, SplitFiles]:
    """The splits of `listing`, with a test split taken from `train` if there is none."""
    splits = dict(listing.splits)
    if "test" not in splits:
        kept, held_out = stratified_split(splits["train"].labels, config.test_fraction, config.seed, "test")
        splits |= {"train": splits["train"].take(kept), "test": splits["train"].take(held_out)}
    return splits


def load_files(config: DatasetConfig) -> RawDataset:
    """Reads all images into memory, without Ray: the same rows as `ingest_files` writes.

    Raises:
        ValueError: as `ingest_files`.
    """
    listing, decoding = listing_of(config)
    found, failures = {}, []
    splits = divided(config, listing)
    for split, rows in splits.items():
        images = np.zeros((len(rows), *decoding.image_shape), np.uint8)
        good = np.ones(len(rows), bool)
        for position, (image, error, _) in enumerate(decoding(rows)):
            if image is None:
                good[position] = False
                failures.append((rows.names[position], str(error)))
            else:
                images[position] = image
        coarse = listing.coarse_of_class
        labels = rows.labels[good]
        found[split] = Rows.of(images[good], labels, None if coarse is None else coarse[labels])
    listing.check_unchanged()
    check_failures(config, listing, splits, failures, Storage("."))
    names = listing.label_names, listing.coarse_label_names
    return RawDataset(found["train"], found["test"], *names, validation=found.get("validation"))


def check_failures(
    config: DatasetConfig,
    listing: Listing,
    splits: dict[str, SplitFiles],
    failures: Corrupt,
    storage: Storage,
    path: str = "corrupt.csv",
) -> None:
    """Checks what is left after decoding.

    Raises:
        ValueError: if more images failed than `max_corrupt`, or a class has none left for training.
    """
    check_corrupt(config, failures, sum(map(len, splits.values())), storage, path)
    lost, size = {name for name, _ in failures}, len(listing.label_names)
    whole = {s: np.array([name not in lost for name in rows.names], bool) for s, rows in splits.items()}
    check_classes(listing, {s: np.bincount(r.labels[whole[s]], minlength=size) for s, r in splits.items()})
