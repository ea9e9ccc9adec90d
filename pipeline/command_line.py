"""From a command line to the settings of a run. Imports neither TensorFlow nor Ray: `--help` answers at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from pipeline.config import PipelineConfig
from pipeline.datasets import SOURCES, check_archive
from pipeline.presets import PRESETS, with_source
from tune.config import SearchConfig
from tune.space import DIMENSIONS

TaskName = Literal["ingest", "preprocess", "search", "train", "evaluate", "register", "report"]


@dataclass(frozen=True)
class Options:
    """A run: what to compute, and how much of it."""

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
    """Preset name and options of a command line without the program's name.

    Ends the process with code 2 and one message where an option cannot be used, with 0 after `--help`.

    Raises:
        ValueError: if options cannot be used together, or the archive cannot be used.
    """
    args = list(argv)
    preset = args.pop(0) if args and not args[0].startswith("-") else "cifar100"
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r} does not exist: give one of {', '.join(PRESETS)}")
    given = {arg.split("=", 1)[0].lstrip("-").replace("-", "_"): arg for arg in args if arg.startswith("--")}
    default = _with_environment(PRESETS[preset](), args)
    # The shape of the images decides which models are valid, so the source is settled before anything is validated.
    source = _value_of("data.source", args)
    if source is not None and source in SOURCES:
        default = with_source(default, source)
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
    check_archive(config.data)
    if options.summary_json and not os.path.isdir(folder := os.path.dirname(os.path.abspath(options.summary_json))):
        raise ValueError(f"summary-json = {options.summary_json!r}: there is no folder {folder}: make it")
    return preset, replace(options, config=config)


def _with_environment(config: PipelineConfig, args: Sequence[str]) -> PipelineConfig:
    """`config` with the places that options or, where they do not, the environment of a cluster gives."""
    uri = _value_of("tracking.uri", args) or os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    storage = _value_of("storage", args) or os.environ.get("PERCEIVER_STORAGE") or config.storage
    return replace(config, storage=storage, tracking=replace(config.tracking, uri=uri))


def _with_absolute_paths(config: PipelineConfig) -> PipelineConfig:
    """`config` for tasks that may run in another folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    data, tracking, storage = config.data, config.tracking, config.storage
    if data.archive is not None:
        data = replace(data, archive=absolute(data.archive))
    if tracking.uri is not None and tracking.uri.startswith("sqlite:///"):
        tracking = replace(tracking, uri=f"sqlite:///{absolute(tracking.uri.removeprefix('sqlite:///'))}")
    if "://" not in storage:
        storage = absolute(storage)
    return replace(config, data=data, tracking=tracking, storage=storage)


def _value_of(name: str, args: Sequence[str]) -> str | None:
    """The value that `args` give to `--name VALUE` or `--name=VALUE`, the last one where there are several."""
    value = None
    for arg, following in zip(args, [*args[1:], None], strict=False):  # one more where there are none
        option, equals, attached = arg.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            value = attached if equals else following
    return value


def _fix_given(config: PipelineConfig, given: dict[str, str]) -> SearchConfig:
    """Narrows each searched dimension whose field was given on the command line to that one value."""
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
