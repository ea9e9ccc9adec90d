"""Settings of the data set."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.fields import EXECUTION, require


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from and how their rows are divided."""

    source: Literal["cifar100", "cifar10", "digits"] = "cifar100"
    """Data set; `digits` is embedded in scikit-learn and needs no download."""
    archive: str | None = field(default=None, metadata=EXECUTION)
    """Local copy of the official .tar.gz; None downloads it. Needs `sha256`."""
    sha256: str | None = None
    """SHA-256 of `archive` in hex; a download is checked against that of the official archive."""
    validation_fraction: float = 0.1
    """Share of the training rows of each class that is kept for validation."""
    test_fraction: float = 0.2
    """Share of the rows of each class that is kept for the test, where the source has no test split (`digits`)."""
    num_shards: int = 16
    """Parquet shards of the training rows; more where a shard would have over 16 MiB of pixels."""
    seed: int = 0
    """Seed of the splits and of the order of rows in the shards."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            require(0 < getattr(self, name) < 1, f"data.{name}", getattr(self, name), "give a share between 0 and 1")
        require(1 <= self.num_shards <= 1000, "data.num_shards", self.num_shards, "give 1 to 1000")
        require(0 <= self.seed < 2**31, "data.seed", self.seed, "give a number in [0, 2**31)")
