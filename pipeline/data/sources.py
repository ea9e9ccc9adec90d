"""The data sets that the pipeline knows, by the value of `data.source`."""

from collections.abc import Mapping

from pipeline.data.cifar import CIFAR10, CIFAR100
from pipeline.data.digits import DIGITS
from pipeline.data.source import Source

SOURCES: Mapping[str, Source] = {source.name: source for source in (CIFAR100, CIFAR10, DIGITS)}
