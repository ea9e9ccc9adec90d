"""The data sets that the pipeline knows, by the value of `data.source`."""

from collections.abc import Mapping

from pipeline.data.cifar import CIFAR10, CIFAR100
from pipeline.data.config import DatasetConfig
from pipeline.data.digits import DIGITS
from pipeline.data.rows import RawDataset
from pipeline.data.source import Source

SOURCES: Mapping[str, Source] = {source.name: source for source in (CIFAR100, CIFAR10, DIGITS)}


def source_of(config: DatasetConfig) -> Source:
    """The source that `config` names. That of `files` follows from `config.found`; nothing is listed.

    Raises:
        ValueError: if nobody has looked for the files yet.
    """
    if config.source != "files":
        return SOURCES[config.source]
    if (found := config.found) is None:
        raise ValueError(
            f"data.path = {config.path!r} has not been looked at: build the configuration with find_images"
        )
    return Source(
        name="files",
        description="Image files of the user's own, whose terms are not known here. The metadata have under `decoding` "
        "how they were fitted to the model's size.",
        load=_load_files,
        image_shape=found.image_shape,
        num_classes=found.num_classes,
        num_coarse_classes=None,
        flips=None,
        train_rows=found.train_rows,
        test_rows=found.test_rows,
        validation_rows=found.validation_rows,
    )


def _load_files(config: DatasetConfig, source: Source) -> RawDataset:
    # Loaded only for images of one's own: the command line imports this module, and `--help` shall be quick.
    from pipeline.data.image_rows import load_files

    return load_files(config)
