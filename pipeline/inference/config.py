"""Options of a batch inference job. Imports no Ray, which reads the environment when it is imported."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.data.config import MAX_PIXELS


@dataclass(frozen=True)
class PredictOptions:
    """Options of a batch inference job."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """models:/NAME/VERSION, models:/NAME@ALIAS, or a folder with an MLmodel file."""
    input: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """Folder of images or of Parquet files, a Parquet file, or an npz file."""
    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]
    """Folder of the results."""
    tracking_uri: str | None = None
    """MLflow tracking URI of the registry that has the model."""
    num_actors: int | None = None
    """Number of processes that classify; None: as many as the CPUs of the cluster allow."""
    cpus_per_actor: float = 1.0
    """CPUs of each of these processes, and its number of threads."""
    use_gpu: bool = False
    """Give every actor a GPU; right on one H100, where its speed was not measured (docs/gpu.md)."""
    batch_size: int = 256
    """Number of images in one call of the model."""
    part_rows: int = 1024
    """Number of images in a part, the unit of progress; choose it so that each actor gets many parts."""
    resize: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stretch images of another size; otherwise they are reported as errors. A model that was trained on image files
    fits them as in its training, with or without this."""
    max_pixels: int = MAX_PIXELS
    """Width times height of the largest image that is decoded, in up to 12 bytes of memory a pixel."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Load a model of another kind than this pipeline exports too: loading it may run its code."""

    def __post_init__(self) -> None:
        for name in ("num_actors", "batch_size", "part_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give at least 1")
        if not 1 <= self.max_pixels <= 2**30:
            raise ValueError(f"max_pixels = {self.max_pixels}: give 1 to 2**30")
        if not 0.001 <= self.cpus_per_actor < float("inf"):
            raise ValueError(f"cpus_per_actor = {self.cpus_per_actor}: give at least 0.001")
