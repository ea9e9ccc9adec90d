"""Settings of the data set."""

from dataclasses import dataclass, field, fields
from typing import Literal

import tyro

from pipeline.fields import ADDED_LATER, EXECUTION, require

MAX_PIXELS = 89_478_485
"""Pillow's own limit, 256 MiB of RGB: a larger image is refused from its header, before anything is decoded."""


@dataclass(frozen=True)
class FoundImages:
    """What lies at `data.path`, as the settings need to know it. Processes that get them do not look again."""

    kind: str
    """`folders`, `metadata.csv`, `parquet`, `tar` or `npz`."""
    fingerprint: str
    """SHA-256 over names, sizes and times of all files."""
    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    train_rows: int
    validation_rows: int
    """0 if there is no such split; likewise `test_rows`."""
    test_rows: int


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from and how their rows are divided."""

    source: Literal["cifar100", "cifar10", "digits", "files"] = "cifar100"
    """Data set; `digits` is embedded in scikit-learn and needs no download; `files` are images of your own."""
    archive: str | None = field(default=None, metadata=EXECUTION)
    """Local copy of the official .tar.gz; None downloads it. Needs `sha256`."""
    sha256: str | None = None
    """SHA-256 of `archive` in hex; a download is checked against that of the official archive. Of `files`, it pins the
    bytes of all files instead of their times."""
    validation_fraction: float = 0.1
    """Share of the training rows of each class that is kept for validation, where the source has no such split."""
    test_fraction: float = 0.2
    """Share of the rows of each class that is kept for the test, where the source has no test split."""
    num_shards: int = 16
    """Parquet shards of the training rows; more where a shard would have over 16 MiB of pixels."""
    seed: int = 0
    """Seed of the splits and of the order of rows in the shards."""
    path: str | None = field(default=None, metadata=EXECUTION)
    """Images of `files`: a folder or a URI that pyarrow.fs takes. docs/data.md says what may lie there."""
    image_size: int | None = field(default=None, metadata=ADDED_LATER)
    """Side in pixels to which `files` are fitted; None: their own size, which must then be the same for all."""
    resize: Literal["crop", "pad", "stretch"] = field(default="crop", metadata=ADDED_LATER)
    """How images of another shape become square: the centre cropped, white added, or stretched."""
    channels: Literal[1, 3] | None = field(default=None, metadata=ADDED_LATER)
    """Make `files` grey (1) or coloured (3); None: as they are, which must then be the same for all."""
    max_corrupt: int = field(default=0, metadata=EXECUTION)
    """Number of images of `files` that may be left out because they cannot be decoded."""
    max_pixels: int = field(default=MAX_PIXELS, metadata=ADDED_LATER)
    """Width times height of the largest image of `files` that is decoded, in up to 12 bytes of memory a pixel."""
    fingerprint: tyro.conf.Fixed[str | None] = field(default=None, metadata=ADDED_LATER)
    """That of `found`, unless `sha256` pins the content."""
    found: tyro.conf.Suppress[FoundImages | None] = field(default=None, metadata=EXECUTION)
    """What lies at `path`."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 1, f"data.{name}", getattr(self, name), "give a share between 0 and 1")
        require(1 <= self.num_shards <= 1000, "data.num_shards", self.num_shards, "give 1 to 1000")
        require(0 <= self.seed < 2**31, "data.seed", self.seed, "give a number in [0, 2**31)")
        size = self.image_size
        require(size is None or 1 <= size <= 4096, "data.image_size", size, "give 1 to 4096")
        require(1 <= self.max_pixels <= 2**30, "data.max_pixels", self.max_pixels, "give 1 to 2**30")
        require(self.max_corrupt >= 0, "data.max_corrupt", self.max_corrupt, "give 0 or more")
        if self.source == "files":
            require(bool(self.path), "data.path", self.path, "give the folder or URI of the images")
            require(self.archive is None, "data.archive", self.archive, "give --data.path for images of your own")
        else:
            for f in fields(self):
                if f.name in ("path", "image_size", "resize", "channels", "max_corrupt", "max_pixels"):
                    value = getattr(self, f.name)
                    require(value == f.default, f"data.{f.name}", value, "it is of --data.source files; leave it out")
