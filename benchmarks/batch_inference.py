"""Throughput of batch inference with `pipeline.predict`, compared with a plain loop in the same number of processes.

    python benchmarks/batch_inference.py                    60,000 random images of 32 x 32 x 3, 2 minutes on 2 cores
    python benchmarks/batch_inference.py --archive PATH     training and test images of CIFAR-100

Both run the exported graph of the same model with one thread per process, and both store only probabilities. The loop
reads arrays and writes to memory, the pipeline reads and writes Parquet. The start of the processes and the loading of
the model are measured separately. The loop runs over the first half of the images before the pipeline and over the
second half after it, so that a gradual change in the speed of the machine affects both alike. Prints a table, then one
line of JSON.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from ending import run_benchmark
from rich.console import Console
from rich.table import Table

from perceiver import presets
from pipeline.data.archives import read_pickles

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
IMAGE_SHAPE = (32, 32, 3)
# A process that is not ready after this time has failed, and the others stop waiting for it.
START_SECONDS = 180


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    num_images: int = 60_000
    """Total number of images."""
    num_processes: int = 2
    """Processes of the loop, and of the pipeline."""
    batch_size: int = 256
    """Images per call of the model."""
    part_rows: int = 1024
    """Images per part of the pipeline, and per row group of its input."""
    archive: str | None = None
    """CIFAR-100 archive whose images are used, repeated if there are too few; default: random bytes."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = _images(options)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # keeps TensorFlow out of this process
            pool.apply(_save_model, (folder / "model",))
        columns = {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images)}
        pq.write_table(
            pa.table(columns), folder / "images.parquet", row_group_size=options.part_rows, compression="zstd"
        )
        half = len(images) // 2
        loops = [_plain_loop(folder / "model", images[:half], options)]
        result = _pipeline(folder, options)
        loops.append(_plain_loop(folder / "model", images[half:], options))
    loop = len(images) / sum(seconds for seconds, _ in loops)
    _show(
        options,
        {
            "loop_images_per_second": loop,
            "loop_halves": [half / seconds for seconds, _ in loops],
            "loop_start_seconds": [start for _, start in loops],
            "pipeline_images_per_second": result["images_per_second"],
            "pipeline_start_seconds": result["start_seconds"],
            "ratio": result["images_per_second"] / loop,
        },
    )


def _images(options: Options) -> np.ndarray:
    if options.archive is None:
        return np.random.default_rng(0).integers(0, 256, (options.num_images, *IMAGE_SHAPE), dtype=np.uint8)
    members = read_pickles(Path(options.archive).read_bytes(), {"train", "test"})
    planes = np.concatenate([members[name][b"data"] for name in ("train", "test")]).reshape(-1, 3, 32, 32)
    return np.resize(planes.transpose(0, 2, 3, 1), (options.num_images, *IMAGE_SHAPE))


def _save_model(folder: Path) -> None:
    """Saves an MLflow model of the preset `cifar100`, untrained because training does not change its cost."""
    import keras
    import mlflow.keras
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from perceiver.model import Perceiver

    config = presets.cifar100()
    images = keras.Input(IMAGE_SHAPE, dtype="uint8")
    probabilities = keras.layers.Softmax(dtype="float32")(Perceiver(**asdict(config))(images))
    mlflow.keras.save_model(
        keras.Model(images, probabilities),
        str(folder),
        save_exported_model=True,
        signature=ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *IMAGE_SHAPE))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, config.num_classes))]),
        ),
        pip_requirements=["keras", "mlflow", "tensorflow"],
        metadata={"label_names": [str(label) for label in range(config.num_classes)]},
    )


def _plain_loop(model: Path, images: np.ndarray, options: Options) -> tuple[float, float]:
    """Seconds from when all processes are ready until the last one ends, and seconds until all are ready."""
    start, spawn = time.time(), multiprocessing.get_context("spawn")
    ready, done = spawn.Barrier(options.num_processes), spawn.SimpleQueue()
    shares = np.array_split(images, options.num_processes)
    arguments = ((model, share, options.batch_size, ready, done) for share in shares)
    processes = [spawn.Process(target=_loop, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, "a process of the plain loop failed, see its output above"
    times = [done.get() for _ in processes]
    began, ended = min(began for began, _ in times), max(ended for _, ended in times)
    return ended - began, began - start


def _loop(model: Path, images: np.ndarray, batch_size: int, ready: Barrier, done: Any) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded = tf.saved_model.load(
        str(_saved_model(model))
    )  # kept in a variable: `serve` alone does not keep the weights alive
    loaded.serve(tf.constant(images[:1]))
    ready.wait(START_SECONDS)
    began = time.time()
    probabilities = [loaded.serve(tf.constant(batch)).numpy() for batch in _batches(images, batch_size)]
    done.put((began, time.time()))
    assert sum(map(len, probabilities)) == len(images)


def _saved_model(folder: Path) -> Path:
    (file,) = folder.rglob("saved_model.pb")
    return file.parent


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _pipeline(folder: Path, options: Options) -> dict[str, float]:
    import ray

    from pipeline.inference.config import PredictOptions
    from pipeline.inference.job import predict

    start = time.time()
    ray.init(address="local", num_cpus=options.num_processes, include_dashboard=False, log_to_driver=False)
    job = PredictOptions(
        str(folder / "model"),
        str(folder / "images.parquet"),
        str(folder / "output"),
        num_actors=options.num_processes,
        batch_size=options.batch_size,
        part_rows=options.part_rows,
    )
    found = predict(job, Console(stderr=True))
    seconds = time.time() - start
    ray.shutdown()
    assert found["new_rows"] == options.num_images
    work = options.num_images / found["images_per_second"]
    return {"images_per_second": found["images_per_second"], "start_seconds": seconds - work}


def _show(options: Options, result: dict[str, Any]) -> None:
    table = Table("", "images/s", "start, s", title=f"{options.num_images:,} images, {options.num_processes} processes")
    halves = " and ".join(f"{rate:.0f}" for rate in result["loop_halves"])
    starts = " and ".join(f"{seconds:.1f}" for seconds in result["loop_start_seconds"])
    table.add_row("plain loop", f"{result['loop_images_per_second']:.0f} (halves {halves})", starts)
    table.add_row(
        "pipeline.predict", f"{result['pipeline_images_per_second']:.0f}", f"{result['pipeline_start_seconds']:.1f}"
    )
    table.add_row("ratio", f"{result['ratio']:.3f}", "")
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    run_benchmark(main)
