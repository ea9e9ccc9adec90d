"""Classifies images with a registered model, in parts, over Ray Data with a pool of actors.

    python -m pipeline.predict models:/perceiver@champion IMAGES OUTPUT --tracking-uri sqlite:///runs/mlflow.db

IMAGES is a folder of images, Parquet (a column `image`: uint8 tensors, or encoded images) or an npz file (`images`).
OUTPUT is a folder of Parquet files, one a part: `row_id`, `name` (path of the image, or null), `class_name`,
`class_index`, `probabilities` and `error`. An image that cannot be read has an error there and nothing else, and stops
nothing. The same command again does the parts that are missing, so that a job which was cut off goes on.

docs/evaluation.md says how quick that is. Exit codes: 0 done, 1 failed, 2 something given cannot be used.
"""

import functools
import json
import logging
import math
import os
import sys
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

from pipeline.cluster import join_or_start
from pipeline.image_parts import ImageInput, Part, list_parts
from pipeline.part_classifier import Classifier, count_errors, file_name, read
from pipeline.progress import make_console
from pipeline.registered_model import RegisteredModel, fetch
from pipeline.shards import own_errors
from pipeline.storage import Storage

JOB_FILE, DONE_FILE = "_job.json", "_done.json"
READER_CPUS = 0.1
"""Of a task that reads a part: little, so that readers find room beside actors that take the rest."""


@dataclass(frozen=True)
class PredictOptions:
    """A job: which model, what it classifies, and where the results go."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """models:/NAME/VERSION, models:/NAME@ALIAS, or a folder with an MLmodel file."""
    input: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """Folder of images or of Parquet files, a Parquet file, or an npz file."""
    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]
    """Folder of the results."""
    tracking_uri: str | None = None
    """MLflow tracking URI of the registry in which the model is."""
    num_actors: int | None = None
    """Processes that classify; None: as many as the cluster has room for."""
    cpus_per_actor: float = 1.0
    """CPUs of each; its threads follow from it."""
    use_gpu: bool = False
    """Give every actor a GPU; not measured on the authors' machines."""
    batch_size: int = 256
    """Images in a call of the model."""
    part_rows: int = 1024
    """Images in a part, the unit that is done or not done: small against what an actor does in all."""
    resize: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resize images of another size; without it they are reported as errors."""

    def __post_init__(self) -> None:
        for name in ("num_actors", "batch_size", "part_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give at least 1")
        if not 0.001 <= self.cpus_per_actor < float("inf"):
            raise ValueError(f"cpus_per_actor = {self.cpus_per_actor}: give at least 0.001")


def predict(options: PredictOptions, console: Console | None = None) -> dict[str, Any]:
    """Does the parts of the job that are not done; Ray is joined or started if need be.

    Returns:
        `parts`, `rows` and `errors` of the whole job; `new_rows`, those done now, and their `images_per_second` from
        when the first actor began, without the start of Ray and of the actors.

    Raises:
        ValueError: if the model or the input cannot be used, or the output holds results of another job.
    """
    progress = _Progress(console or make_console())
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
            for record in _predictions(options, model, source, output, todo):
                progress.add(record)
    done = {
        "parts": len(source.parts),
        "rows": source.num_rows,
        "errors": count_errors(output, (part.number for part in source.parts)),
    }
    output.write_json(DONE_FILE, done)
    for name in output.list(""):
        if name.endswith(".tmp"):  # of processes that were killed while they wrote
            output.delete(name)
    return done | {"new_rows": progress.rows, "images_per_second": progress.images_per_second}


def _predictions(
    options: PredictOptions, model: RegisteredModel, source: ImageInput, output: Storage, todo: list[Part]
) -> Iterator[dict[str, Any]]:
    """Does `todo`; yields a record of each part as it is written."""
    paths = [path for path in model.folder.rglob("*") if path.is_file()]
    files = {path.relative_to(model.folder).as_posix(): path.read_bytes() for path in paths}
    actors = options.num_actors or max(1, int(ray.cluster_resources().get("CPU", 1) // options.cpus_per_actor))
    dataset = ray.data.from_items([{"part": part.to_json()} for part in todo], override_num_blocks=len(todo))
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.issue_detectors_config.detectors = []  # they warn of memory that the model needs
    context.target_max_block_size = None  # a part stays one block, which is what an actor gets
    read_rows = functools.partial(
        read, kind=source.kind, root=source.root, image_shape=model.image_shape, resize=options.resize
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
    """What decides the results."""
    return {
        "model": {"uri": model.uri, "uuid": model.uuid},
        "input": {"kind": source.kind, "rows": source.num_rows, "fingerprint": source.fingerprint},
        "settings": {"part_rows": options.part_rows, "batch_size": options.batch_size, "resize": options.resize},
    }


def _claim(output: Storage, job: dict[str, Any]) -> None:
    """Makes the output that of `job`.

    Raises:
        ValueError: if it is that of another one, or holds something else.
    """
    if not output.exists(JOB_FILE):
        if output.list(""):
            raise ValueError(
                f"output = {output.uri!r} is not empty, and no results of this command: give another folder"
            )
        output.write_json(JOB_FILE, job)
        return
    before = output.read_json(JOB_FILE)
    if different := [name for name in job if job[name] != before[name]]:
        name = different[0]
        raise ValueError(
            f"output = {output.uri!r} holds results of another {name}: {json.dumps(before[name])}, not "
            f"{json.dumps(job[name])}: give another folder, or remove this one"
        )


class _Progress:
    """Says how a job gets on, at most once a second, and counts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows = self._errors = 0
        self._began, self._ended, self._said = math.inf, 0.0, 0.0

    def begin(self, source: ImageInput, todo: list[Part]) -> None:
        self._todo = sum(part.num_rows for part in todo)
        done = len(source.parts) - len(todo)
        before = f", {done} of them done before" if done else ""
        self._console.print(f"{source.num_rows:,} images ({source.kind}) in {len(source.parts)} parts{before}")

    def add(self, record: dict[str, Any]) -> None:
        self._rows += record["rows"]
        self._errors += record["errors"]
        self._began, self._ended = min(self._began, record["began"]), max(self._ended, record["ended"])
        if time.monotonic() - self._said < 1 and self._rows < self._todo:
            return
        self._said = time.monotonic()
        left = f", {(self._todo - self._rows) / self.images_per_second:.0f} s left"
        errors = f", {self._errors} cannot be read" if self._errors else ""
        self._console.print(
            f"{self._rows:,} of {self._todo:,} images, {self.images_per_second:.0f} images/s{left}{errors}"
        )

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def images_per_second(self) -> float:
        """From when the first actor began its first part: the start of Ray and of the actors is before that."""
        return self._rows / max(self._ended - self._began, 1e-9) if self._rows else 0.0


def main() -> int:
    try:
        options = tyro.cli(PredictOptions, prog="python -m pipeline.predict", description=__doc__)
        summary = predict(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    make_console().print(
        f"{summary['rows']:,} images done, {summary['errors']} of them could not be read: {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
