"""A batch inference job: its options, the check that the output folder belongs to it, and its parts over Ray Data."""

import functools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import ray.data
import tyro
from rich.console import Console

from pipeline.data.image_decoding import Resize
from pipeline.data.image_files import ImageInput, Part, list_parts
from pipeline.data.ray_rows import own_errors
from pipeline.inference.classifier import Classifier, count_errors, file_name, read
from pipeline.registry.fetch import RegisteredModel, fetch
from pipeline.storage import Storage
from pipeline.workflow.cluster import join_or_start

JOB_FILE, DONE_FILE = "_job.json", "_done.json"
READER_CPUS = 0.1
"""CPUs of a task that reads a part; low, so that readers can run next to actors that take all other CPUs."""


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
    """Give every actor a GPU; not measured on the authors' machines."""
    batch_size: int = 256
    """Number of images in one call of the model."""
    part_rows: int = 1024
    """Number of images in a part, the unit of progress; choose it so that each actor gets many parts."""
    resize: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stretch images of another size; otherwise they are reported as errors. A model that was trained on image files
    fits them as in its training, with or without this."""

    def __post_init__(self) -> None:
        for name in ("num_actors", "batch_size", "part_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give at least 1")
        if not 0.001 <= self.cpus_per_actor < float("inf"):
            raise ValueError(f"cpus_per_actor = {self.cpus_per_actor}: give at least 0.001")


def predict(options: PredictOptions, console: Console) -> dict[str, Any]:
    """Does the parts of the job that are not done yet. Connects to Ray, or starts it, if necessary.

    Args:
        console: Shows the progress.

    Returns:
        `parts`, `rows` and `errors` of the whole job; `new_rows`, the rows of this call, and their `images_per_second`
        from the first work of an actor, without the start of Ray and of the actors.

    Raises:
        ValueError: If the model or the input cannot be used, or the output holds results of another job.
    """
    progress = _JobProgress(console)
    source = list_parts(options.input, options.part_rows)
    output = Storage(options.output)
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(options.model, options.tracking_uri, Path(folder))
        _claim(output, _job(options, model, source))
        present = set(output.list(""))
        todo = [part for part in source.parts if file_name(part.number) not in present]
        progress.begin(source, todo)
        if todo:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if not ray.is_initialized():
                join_or_start()
            for finished in _predictions(options, model, source, output, todo):
                progress.add(finished)
    done = {
        "parts": len(source.parts),
        "rows": source.num_rows,
        "errors": count_errors(output, (part.number for part in source.parts)),
    }
    output.write_json(DONE_FILE, done)
    for name in output.list(""):
        if name.endswith(".tmp"):  # from processes that were killed while writing
            output.delete(name)
    return done | {"new_rows": progress.rows, "images_per_second": progress.images_per_second}


def _predictions(
    options: PredictOptions, model: RegisteredModel, source: ImageInput, output: Storage, todo: list[Part]
) -> Iterator[dict[str, Any]]:
    """Classifies the parts `todo`; yields the row that `Classifier` returns for each part, once it is written."""
    paths = [path for path in model.folder.rglob("*") if path.is_file()]
    files = {path.relative_to(model.folder).as_posix(): path.read_bytes() for path in paths}
    actors = options.num_actors or max(1, int(ray.cluster_resources().get("CPU", 1) // options.cpus_per_actor))
    dataset = ray.data.from_items([{"part": part.to_json()} for part in todo], override_num_blocks=len(todo))
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.issue_detectors_config.detectors = []  # they warn about the memory that the model uses
    context.target_max_block_size = None  # keeps a part in one block, because an actor gets one block per call
    read_rows = functools.partial(
        read, kind=source.kind, root=source.root, image_shape=model.image_shape, resize=_policy(options, model)
    )
    done = dataset.map_batches(read_rows, batch_size=1, num_cpus=READER_CPUS).map_batches(
        Classifier,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(todo))),
        num_cpus=max(0.001, options.cpus_per_actor - READER_CPUS),
        num_gpus=1 if options.use_gpu else None,
        fn_constructor_kwargs={
            "files": files,
            "source": model.uri,
            "output": output,
            "threads": max(1, int(options.cpus_per_actor)),
            "batch_size": options.batch_size,
        },
    )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with own_errors():
        yield from done.iter_rows()


def _job(options: PredictOptions, model: RegisteredModel, source: ImageInput) -> dict[str, Any]:
    """Everything that determines the results."""
    return {
        "model": {"uri": model.uri, "uuid": model.uuid},
        "input": {"kind": source.kind, "rows": source.num_rows, "fingerprint": source.fingerprint},
        "settings": {
            "part_rows": options.part_rows,
            "batch_size": options.batch_size,
            "resize": model.resize or options.resize,
        },
    }


def _policy(options: PredictOptions, model: RegisteredModel) -> Resize | None:
    """How images of another size are fitted; None refuses them."""
    return model.resize or ("stretch" if options.resize else None)


def _claim(output: Storage, job: dict[str, Any]) -> None:
    """Marks the output as that of `job`.

    Raises:
        ValueError: If the output belongs to another job, or holds other files.
    """
    if not output.exists(JOB_FILE):
        if output.list(""):
            raise ValueError(
                f"output = {output.uri!r} is not empty and has no results of this command: give another folder"
            )
        output.write_json(JOB_FILE, job)
        return
    before = output.read_json(JOB_FILE)
    if different := [name for name in job if job[name] != before[name]]:
        name = different[0]
        raise ValueError(
            f"output = {output.uri!r} holds results of another {name}: {json.dumps(before[name])}, not "
            f"{json.dumps(job[name])}: give another folder, or delete this one"
        )


class _JobProgress:
    """Counts the rows of a job and prints its progress, at most once per second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows = self._errors = 0
        self._began, self._ended, self._printed = math.inf, 0.0, 0.0

    def begin(self, source: ImageInput, todo: list[Part]) -> None:
        """Starts the count; parts that are not in `todo` were done by an earlier call."""
        self._todo = sum(part.num_rows for part in todo)
        done = len(source.parts) - len(todo)
        before = f", {done} of them done before" if done else ""
        self._console.print(f"{source.num_rows:,} images ({source.kind}) in {len(source.parts)} parts{before}")

    def add(self, part: dict[str, Any]) -> None:
        """Counts a finished part, from the row that `Classifier` returns."""
        self._rows += part["rows"]
        self._errors += part["errors"]
        self._began, self._ended = min(self._began, part["began"]), max(self._ended, part["ended"])
        if time.monotonic() - self._printed < 1 and self._rows < self._todo:
            return
        self._printed = time.monotonic()
        left = f", {(self._todo - self._rows) / self.images_per_second:.0f} s left"
        errors = f", {self._errors} cannot be read" if self._errors else ""
        self._console.print(
            f"{self._rows:,} of {self._todo:,} images, {self.images_per_second:.0f} images/s{left}{errors}"
        )

    @property
    def rows(self) -> int:
        """Number of rows so far."""
        return self._rows

    @property
    def images_per_second(self) -> float:
        """Speed since the first actor began its first part, without the start of Ray and of the actors."""
        return self._rows / max(self._ended - self._began, 1e-9) if self._rows else 0.0
