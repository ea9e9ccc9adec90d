"""The seven tasks: what each follows from, which settings decide its output, and which function does the work."""

from dataclasses import replace
from typing import Any

from pipeline.data.config import MAX_PIXELS
from pipeline.data.sources import source_of
from pipeline.fields import keyed
from pipeline.masking import mask
from pipeline.settings.config import PipelineConfig
from pipeline.tasks.steps import evaluate, ingest, preprocess, register, report, search, train
from pipeline.workflow.task import Task


def _is_registered_there(config: PipelineConfig, output: dict[str, Any]) -> bool:
    """Whether the version is where `config` wants it; the registry is asked whether it still has it."""
    wanted = (mask(config.tracking_uri), config.tracking.model_name, config.tracking.alias)
    if (mask(output["tracking_uri"]), output["name"], output["champion"]) != wanted:
        return False
    from pipeline.registry.fetch import is_registered  # MLflow is loaded only if there is something to ask

    return is_registered(output["uri"], config.tracking_uri)


def _has_few_corrupt(config: PipelineConfig, output: dict[str, Any]) -> bool:
    """Whether as many images were left out as `config` accepts: an earlier run may have accepted more."""
    return len(output.get("corrupt", ())) <= config.data.max_corrupt


def _trials(config: PipelineConfig) -> str:
    if not config.search.num_trials:
        return "nothing: the search is off"
    workers = config.search.workers_per_trial
    each = (
        f"{workers} workers with {config.search.cpus_per_trial:g} CPU"
        if workers > 1
        else f"{config.search.cpus_per_trial:g} CPU"
    )
    return f"{config.search.num_trials} trials, {each} each"


def _workers(config: PipelineConfig) -> str:
    gpu = " and a GPU" if config.train.use_gpu else ""
    least, most = config.train.min_workers, config.train.max_workers
    count = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} workers, {config.train.cpus_per_worker:g} CPU{gpu} each"


def _readers(config: PipelineConfig) -> str:
    return "all free CPUs" if config.data.source == "files" else "1 process"


def _ingest_section(config: PipelineConfig) -> dict[str, Any]:
    data = config.data
    # A source without a test split gets one from the settings.
    own_split = {} if source_of(data).test_rows else {"test_fraction": data.test_fraction, "seed": data.seed}
    files = {name: getattr(data, name) for name in ("fingerprint", "image_size", "resize", "channels", "seed")}
    if data.max_pixels != MAX_PIXELS:  # the default is in no key, so that earlier runs keep theirs
        files["max_pixels"] = data.max_pixels
    if data.resize == "pad":
        files["pad"] = 2  # before, a long image became an empty one
    return {"source": data.source, "sha256": data.sha256} | own_split | (files if data.source == "files" else {})


TASKS: tuple[Task[PipelineConfig], ...] = (
    Task("ingest", 1, (), _ingest_section, ingest, _readers, is_current=_has_few_corrupt),
    Task("preprocess", 1, ("ingest",), lambda config: keyed(config.data), preprocess, lambda config: "all free CPUs"),
    Task(
        "search",
        1,
        ("preprocess",),
        lambda config: (
            # A trial has the search's number of epochs.
            {
                "model": keyed(config.model),
                "train": keyed(replace(config.train, epochs=1)),
                "search": keyed(config.search),
            }
            if config.search.num_trials
            else {}
        ),
        search,
        _trials,
        keeps_state=True,
    ),
    Task(
        "train",
        1,
        ("preprocess", "search"),
        lambda config: {"model": keyed(config.model), "train": keyed(config.train)},
        train,
        _workers,
        keeps_state=True,
        stoppable=True,
    ),
    Task(
        "evaluate",
        2,
        ("preprocess", "train"),
        lambda config: {"evaluation": keyed(config.evaluation)},
        evaluate,
        lambda config: "1 process",
    ),
    Task(
        "register",
        2,
        ("preprocess", "search", "train", "evaluate"),
        lambda config: {},
        register,
        lambda config: "1 process",
        is_current=_is_registered_there,
    ),
    Task(
        "report",
        1,
        ("preprocess", "search", "train", "evaluate", "register"),
        lambda config: {},
        report,
        lambda config: "1 process",
    ),
)
