"""From a command line to a configuration. Imports neither TensorFlow nor Ray, so that `--help` answers at once.

A preset is a positional argument and not a subcommand of tyro, which could not be left out. Tyro does not say which
options were given; a few decide about defaults and about the search, so they are looked up before it parses.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from pipeline.contact import check_path, problem_of_home
from pipeline.data.config import DatasetConfig
from pipeline.data.download import check_archive
from pipeline.data.sources import SOURCES, source_of
from pipeline.masking import mask
from pipeline.settings.config import PipelineConfig
from pipeline.settings.no_effect import without_effect
from pipeline.settings.presets import PRESETS, with_source
from tune.config import SearchConfig
from tune.space import DIMENSIONS

TaskName = Literal["ingest", "preprocess", "search", "train", "evaluate", "register", "report"]


@dataclass(frozen=True)
class Options:
    """What to run, and how much of it."""

    config: Annotated[PipelineConfig, tyro.conf.arg(name="")] = field(default_factory=PipelineConfig)
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration, the tasks, their keys and their resources; start nothing."""
    until: TaskName | None = None
    """Stop after this task."""
    force: tuple[TaskName, ...] = ()
    """Run these tasks, and all that follow from them, although they are done."""
    summary_json: str | None = None
    """Write the summary to this file as JSON."""


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """Parses a command line.

    The process ends with code 2 and one message if an option cannot be used, and with code 0 after `--help`. Options
    that do nothing beside the others are named on standard error.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Name of the preset, and the options.

    Raises:
        ValueError: if options cannot be used together, or the archive cannot be used.
    """
    args = list(argv)
    preset = args.pop(0) if args and not args[0].startswith("-") else "cifar100"
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r} does not exist: give one of {', '.join(PRESETS)}")
    given = {arg.split("=", 1)[0].lstrip("-").replace("-", "_"): arg for arg in args if arg.startswith("--")}
    early = _early_values(args)
    default = _with_environment(PRESETS[preset](), early)
    # The shape of the images decides which models are valid, so the source is known before anything is validated.
    if early["data.source"] in SOURCES:
        default = with_source(default, replace(default.data, source=early["data.source"]))  # type: ignore[arg-type]
    elif early["data.source"] == "files" and not {"-h", "--help"} & set(args):
        default = with_source(default, _find_images(args, default))
    options = tyro.cli(
        Options,
        prog="run.py [PRESET]",
        description=f"Runs the pipeline. PRESET is one of {', '.join(PRESETS)}; default cifar100.",
        default=Options(config=default),
        args=args,
        config=(tyro.conf.SuppressFixed,),
    )
    config = replace(_with_absolute_paths(options.config), search=_fix_given(options.config, given))
    config.search_space()
    check_archive(config.data, source_of(config.data))
    summary_json = options.summary_json
    if summary_json:
        summary_json = _expanded(summary_json, "summary-json")
        _check_writable(summary_json)
    for line in without_effect(config, given):
        print(mask(f"warning: {line}"), file=sys.stderr)
    return preset, replace(options, config=config, summary_json=summary_json)


def _check_writable(path: str) -> None:
    check_path(path, "summary-json")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"summary-json = {path!r}: there is no folder {folder}: make it")
    if os.path.isdir(path):
        raise ValueError(f"summary-json = {path!r} is a folder: give the path of a file")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"summary-json = {path!r} cannot be written: give another path")


@dataclass(frozen=True)
class _DataOptions:
    """The options of `data` alone."""

    data: DatasetConfig


def _find_images(args: Sequence[str], default: PipelineConfig) -> DatasetConfig:
    """The options of `data`, with what lies at `data.path`.

    Raises:
        ValueError: if it cannot be used; names the option and the remedy.
    """
    from pipeline.data.image_survey import find_images

    options, _ = tyro.cli(
        _DataOptions,
        prog="run.py [PRESET]",
        default=_DataOptions(default.data),
        args=args,
        config=(tyro.conf.SuppressFixed,),
        add_help=False,
        return_unknown_args=True,
    )
    # A dry run keeps nothing that a later one would read.
    return find_images(_with_absolute_path(options.data), default.storage, keep_survey="--dry-run" not in args)


def _with_absolute_path(data: DatasetConfig) -> DatasetConfig:
    return data if data.path is None or "://" in data.path else replace(data, path=_absolute(data.path, "data.path"))


def _absolute(path: str, option: str) -> str:
    return os.path.abspath(_expanded(path, option))


def _expanded(path: str, option: str) -> str:
    """`path` with the home that `~` stands for.

    Raises:
        ValueError: if there is no such home; names the option.
    """
    if problem := problem_of_home(path):
        raise ValueError(f"{option} = {path!r} {problem}")
    return os.path.expanduser(path)


def _early_values(args: Sequence[str]) -> dict[str, str]:
    """The values of the options that decide about defaults of others; "" for those that are not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("data.source", "storage", "tracking.uri"):
        parser.add_argument(f"--{name}", nargs="?", default="", const="")  # tyro complains of a missing value
    return vars(parser.parse_known_args(args)[0])


def _with_environment(config: PipelineConfig, early: Mapping[str, str]) -> PipelineConfig:
    """`config` with the storage and the tracking server that the options give, or else the environment."""
    uri = early["tracking.uri"] or os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    storage = early["storage"] or os.environ.get("PERCEIVER_STORAGE") or config.storage
    return replace(config, storage=storage, tracking=replace(config.tracking, uri=uri))


def _with_absolute_paths(config: PipelineConfig) -> PipelineConfig:
    """`config` with paths that mean the same to tasks in another working directory."""
    data, tracking, storage = _with_absolute_path(config.data), config.tracking, config.storage
    if data.archive is not None:
        data = replace(data, archive=_absolute(data.archive, "data.archive"))
    if tracking.uri is not None and tracking.uri.startswith("sqlite:///"):
        file = _absolute(tracking.uri.removeprefix("sqlite:///"), "tracking.uri")
        tracking = replace(tracking, uri=f"sqlite:///{file}")
    if "://" not in storage:
        storage = _absolute(storage, "storage")
    return replace(config, data=data, tracking=tracking, storage=storage)


def _fix_given(config: PipelineConfig, given: dict[str, str]) -> SearchConfig:
    """Narrows each searched dimension whose field was given on the command line to the given value."""
    search = config.search
    for dimension in DIMENSIONS:
        name = f"{dimension.section}.{dimension.name}"
        if name not in given:
            continue
        if f"search.{dimension.name}" in given:
            raise ValueError(
                f"{given[name]} fixes what {given[f'search.{dimension.name}']} would search: give one of the two"
            )
        value = getattr(getattr(config, dimension.section), dimension.name)
        if getattr(search, dimension.name):  # else it is not searched anyway
            # A weight decay of 0 has no place on a log scale.
            search = replace(search, **{dimension.name: (value,) if value else ()})  # type: ignore[arg-type]
    return search
