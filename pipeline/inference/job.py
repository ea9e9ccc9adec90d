"""A batch inference job: the check that the output folder belongs to it, and its parts over Ray Data."""

import contextlib
import functools
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
from rich.console import Console
from rich.markup import escape

from pipeline.data.config import MAX_PIXELS
from pipeline.data.file_tree import check_unchanged
from pipeline.data.image_decoding import Resize
from pipeline.data.image_files import ImageInput, Part, check_input, list_parts
from pipeline.data.ray_rows import own_errors
from pipeline.devices import DeviceError, mention_unused_gpus, require_gpu_in_cluster
from pipeline.inference.claim import DONE_FILE, JOB_FILE, PART_PREFIX, check_claim, claim, file_name
from pipeline.inference.classifier import Classifier, count_errors, read
from pipeline.inference.config import PredictOptions
from pipeline.registry.fetch import RegisteredModel, fetch
from pipeline.storage import Storage, open_storage
from pipeline.workflow.cluster import join_or_start
from pipeline.workflow.nodes import check_file, check_nodes

WAIT_SECONDS = 30.0
READER_CPUS = 0.1
"""CPUs of a task that reads a part; low, so that readers can run next to actors that take all other CPUs."""
PACKAGES = ("keras", "tensorflow", "ray", "numpy", "pyarrow", "pillow")
"""Packages whose versions are compared between the nodes, since the results may depend on them."""
CALLS, QUEUED = 2, 1
"""Parts that an actor has at a time: one is classified while another is written; and those that wait for it then."""
READER_BYTES = 1 << 30
"""Memory of such a task, of which so many run at once as the hosts have memory for: the largest image takes as much."""


def predict(options: PredictOptions, console: Console) -> dict[str, Any]:
    """Does the parts of the job that are not done yet. Connects to Ray, or starts it, if necessary.

    Args:
        console: Shows the progress.

    Returns:
        `parts`, `rows` and `errors` of the whole job; `new_rows`, the rows of this call, their `images_per_second`
        from the first work of an actor, without the start of Ray and of the actors, and the `devices` that did it.

    Raises:
        ValueError: If the model or the input cannot be used, the input changes while it is read, the output holds
            results of another job or another one takes it, a node of the cluster does not see the input or the output,
            or none has room for a process that classifies.
        DeviceError: If a process cannot compute on the GPU that was asked for, or its memory does not suffice.
    """
    progress = _JobProgress(console)
    output = open_storage(options.output, "output")
    source = list_parts(options.input, options.part_rows, output)
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(options.model, options.tracking_uri, Path(folder), options.trust)
        check_input(source, model.image_shape)
        job = _job(options, model, source)
        try:
            claim(output, job)
        except OSError as error:
            raise ValueError(f"output = {options.output!r} cannot be read and written: {error}") from error
        present = set(output.list(""))
        todo = [part for part in source.parts if file_name(part.number) not in present]
        progress.begin(source, todo)
        if todo:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            if join_or_start():
                check_nodes(output, PACKAGES, console.print, "output")
                check_file(source.root, todo[0].files[0], "input", console.print)
            _check_room(options)
            if options.use_gpu:
                require_gpu_in_cluster("use_gpu")
            else:
                mention_unused_gpus("use_gpu", console.print)
            with progress.waiting(f"a process with {_needs(options)}"):
                for finished in _predictions(options, model, source, output, job, todo):
                    progress.add(finished)
            remedy = "rows may be lost or of both versions, so give the command again with another output"
            check_unchanged(options.input, "input", source.files, remedy)
    done = {
        "parts": len(source.parts),
        "rows": source.num_rows,
        "errors": count_errors(output, job, (part.number for part in source.parts)),
    }
    check_claim(output, job)
    output.write_json(DONE_FILE, done)
    for name in output.list(""):
        # From processes that were killed while writing; other files are somebody's.
        if name.startswith((PART_PREFIX, JOB_FILE, DONE_FILE)) and name.endswith(".tmp"):
            output.delete(name)
    new = {"images_per_second": progress.images_per_second, "devices": sorted(progress.devices)}
    return done | {"new_rows": progress.rows} | new


def _predictions(
    options: PredictOptions,
    model: RegisteredModel,
    source: ImageInput,
    output: Storage,
    job: dict[str, Any],
    todo: list[Part],
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
    read_rows = functools.partial(
        read,
        kind=source.kind,
        root=source.root,
        image_shape=model.image_shape,
        resize=_policy(options, model),
        max_pixels=options.max_pixels,
    )
    done = dataset.map_batches(
        read_rows, batch_size=1, num_cpus=READER_CPUS, memory=_reader_bytes(options.max_pixels)
    ).map_batches(
        Classifier,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(actors, len(todo)),
            max_concurrent_calls_per_actor=CALLS,
            max_tasks_in_flight_per_actor=CALLS + QUEUED,
            enable_true_multi_threading=True,
        ),
        num_cpus=max(0.001, options.cpus_per_actor - READER_CPUS),
        num_gpus=1 if options.use_gpu else None,
        fn_constructor_kwargs={
            "files": files,
            "source": model.uri,
            "output": output,
            "job": job,
            "threads": max(1, int(options.cpus_per_actor)),
            "batch_size": options.batch_size,
            "use_gpu": options.use_gpu,
        },
    )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with own_errors(DeviceError):
        yield from done.iter_rows()


def _reader_bytes(max_pixels: int) -> float:
    """`READER_BYTES`, more if larger images are allowed, or of small hosts what lets the largest run two readers."""
    return min(
        READER_BYTES * max(1.0, max_pixels / MAX_PIXELS),
        max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]) // 2,
    )


def _needs(options: PredictOptions) -> str:
    return f"{options.cpus_per_actor:g} CPU{' and a GPU' if options.use_gpu else ''}"


def _check_room(options: PredictOptions) -> None:
    """Checks that a node of the cluster has what a process needs, for which Ray would wait without end.

    Raises:
        ValueError: if none has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(n.get("CPU", 0) >= options.cpus_per_actor and n.get("GPU", 0) >= options.use_gpu for n in nodes):
        largest = max((n.get("CPU", 0) for n in nodes), default=0)
        gpus = sum(n.get("GPU", 0) for n in nodes)
        raise ValueError(
            f"cpus_per_actor = {options.cpus_per_actor:g}, use_gpu = {options.use_gpu}: no node has {_needs(options)}, "
            f"the largest has {largest:g} CPUs, and the cluster {gpus:g} GPUs: ask for less"
        )


def _job(options: PredictOptions, model: RegisteredModel, source: ImageInput) -> dict[str, Any]:
    """Everything that determines the results."""
    return {
        "model": {"uri": model.uri, "uuid": model.uuid},
        "input": {"kind": source.kind, "rows": source.num_rows, "fingerprint": source.fingerprint},
        "settings": {
            "part_rows": options.part_rows,
            "batch_size": options.batch_size,
            "resize": model.resize or options.resize,
            # Jobs of before the option go on.
            **({} if options.max_pixels == MAX_PIXELS else {"max_pixels": options.max_pixels}),
        },
    }


def _policy(options: PredictOptions, model: RegisteredModel) -> Resize | None:
    """How images of another size are fitted; None refuses them."""
    return model.resize or ("stretch" if options.resize else None)


class _JobProgress:
    """Counts the rows of a job and prints its progress, at most once per second.

    Attributes:
        devices: Names of the devices that classified.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows = self._errors = 0
        self._began, self._ended, self._printed = math.inf, 0.0, 0.0
        self.devices: set[str] = set()

    def begin(self, source: ImageInput, todo: list[Part]) -> None:
        """Starts the count; parts that are not in `todo` were done by an earlier call."""
        self._todo = sum(part.num_rows for part in todo)
        done = len(source.parts) - len(todo)
        before = f", {done} of them done before" if done else ""
        parts = "1 part" if len(source.parts) == 1 else f"{len(source.parts)} parts"
        self._console.print(f"{source.num_rows:,} images ({source.kind}) in {parts}{before}")
        if source.left_out:
            reasons = "; ".join(f"{count:,}: {reason}" for reason, count in source.left_out.items())
            self._console.print(escape(f"{sum(source.left_out.values()):,} files left out: {reasons}"))

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within the block, says once that the job waits for `what` if no part is finished after `WAIT_SECONDS`."""
        line = f"has waited {WAIT_SECONDS:.0f} s for the first part: {what} has to start and to load the model"
        self._wait = threading.Timer(WAIT_SECONDS, self._console.print, [line])
        self._wait.daemon = True
        self._wait.start()
        try:
            yield
        finally:
            self._wait.cancel()

    def add(self, part: dict[str, Any]) -> None:
        """Counts a finished part, from the row that `Classifier` returns."""
        self._wait.cancel()
        self._rows += part["rows"]
        self._errors += part["errors"]
        self.devices.add(part["device"])
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
