"""What a data set promises before it is read, and the checks that its rows keep the promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.data.config import DatasetConfig
from pipeline.data.rows import RawDataset, Rows


@dataclass(frozen=True)
class Archive:
    """The official `.tar.gz` of a data set."""

    url: str
    sha256: str
    """SHA-256 in hex."""


@dataclass(frozen=True)
class Source:
    """What is known of a data set before it is read."""

    name: str
    """Value of `data.source`."""
    description: str
    """What the data set is, by whom, and its terms; a sentence or two for the model card."""
    load: Callable[[DatasetConfig, Source], RawDataset]
    """Reads the whole data set into memory and verifies that it keeps what this source promises."""
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    num_coarse_classes: int | None
    """None if the classes have no coarser grouping."""
    flips: bool | None
    """Whether the mirror image of a row still shows its class; not so for digits. None: only the user knows."""
    train_rows: int
    """Rows of the training split, or of the whole data set if `test_rows` is 0."""
    test_rows: int
    """Rows of the test split; 0 if the source has none and `DatasetConfig.test_fraction` decides."""
    validation_rows: int = 0
    """Likewise of the validation split and `DatasetConfig.validation_fraction`."""
    archive: Archive | None = None
    """None if the data come with a dependency."""


def verify_split(split: Rows, source: Source, rows: int | None, what: str) -> None:
    """Checks the rows of a split against what their source promises.

    Args:
        split: All rows of the split.
        source: The source and its numbers of classes.
        rows: Number of rows that the source promises, equally many of every class; None: not known.
        what: Name of the split in messages.

    Raises:
        ValueError: if labels are missing or out of range, or a class has another number of rows.
    """
    for kind, labels, num_classes in (
        ("labels", split.labels, source.num_classes),
        ("coarse labels", split.coarse_labels, source.num_coarse_classes),
    ):
        if labels is None or num_classes is None:
            continue
        if len(labels) != len(split.images):
            raise ValueError(f"{what}: expected {len(split.images)} {kind}, one for each image, found {len(labels)}")
        if (highest := labels.max(initial=-1)) >= num_classes:
            raise ValueError(f"{what}: expected {kind} from 0 to {num_classes - 1}, found {highest}")
        if rows is None:
            continue
        counts = np.bincount(labels, minlength=num_classes)
        expected = rows // num_classes
        if (wrong := np.flatnonzero(counts != expected)).size:
            raise ValueError(
                f"{what}: expected {expected} rows of each of the {num_classes} {kind}, "
                f"found {counts[wrong[0]]} of {wrong[0]} and {wrong.size - 1} other counts that differ"
            )


def verify_coarse(train: Rows, test: Rows, source: Source) -> None:
    """Checks that all rows of a class have the same coarse class, over both splits.

    Raises:
        ValueError: if a row has another one; names it and both coarse classes.
    """
    coarse_of = np.full(source.num_classes, -1)
    for what, split in (("train", train), ("test", test)):
        if split.coarse_labels is None:
            continue
        if what == "train":
            coarse_of[split.labels] = split.coarse_labels
        if (wrong := np.flatnonzero(coarse_of[split.labels] != split.coarse_labels)).size:
            label, found = split.labels[wrong[0]], split.coarse_labels[wrong[0]]
            raise ValueError(
                f"{source.name}: {what}: expected the coarse label {coarse_of[label]} with the label {label}, as in "
                f"other rows, found {found}"
            )
