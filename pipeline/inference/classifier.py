"""The actor of batch inference: classifies the images of one part and writes its results as one file.

Ray's processes import this module. If its classes were defined in the command itself, Ray would have to pickle them.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.image_files import Part, read_part
from pipeline.devices import memory_errors, multiply_on_gpu, require_gpu, set_up_tensorflow, used_device
from pipeline.inference.claim import DIGEST_KEY, check_claim, check_part, digest_of, file_name
from pipeline.registry.fetch import RegisteredModel
from pipeline.storage import Storage

NOT_FINITE = "the model gives it no finite probabilities"


def read(batch: dict[str, np.ndarray], **arguments: Any) -> pa.Table:
    """Reads the rows of the only part in `batch`, packed; `arguments` are those of `read_part`."""
    return packed(read_part(Part.from_json(str(batch["part"][0])), **arguments))


def packed(rows: pa.Table) -> pa.Table:
    """A table with one row, which is `rows` as an Arrow stream.

    Ray Data counts batches in rows, and refuses to leave the count open where an actor has a GPU. So a part is a row.
    """
    counted = pa.MockOutputStream()
    with pa.ipc.new_stream(counted, rows.schema) as stream:
        stream.write_table(rows)
    # A stream of unknown size would grow by doubling, and a part of large images has hundreds of MB.
    data = pa.allocate_buffer(counted.size())
    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(data), rows.schema) as stream:
        stream.write_table(rows)
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.table({"part": pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])})


def unpacked(batch: pa.Table) -> pa.Table:
    """The rows of the only part in `batch`, which `packed` has packed; they share its memory."""
    return pa.ipc.open_stream(batch["part"][0].as_buffer()).read_all()


class Classifier:
    """An actor that holds the model and classifies parts.

    It may be called from two threads: one classifies, while the other waits for the disk or the object store.

    Args:
        files: Contents of the model's files by path, because other hosts do not have the folder of the driver.
        source: URI of the model.
        output: Storage for the results.
        threads: Number of threads for TensorFlow.
        batch_size: Number of images in one call of the model.
        use_gpu: Whether to insist on a GPU.
        job: The job that the output has to be claimed for; None if nobody else writes there.

    Of an error in a constructor Ray passes on the text alone, with a traceback. So what fails here is raised by the
    first call.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        source: str,
        output: Storage,
        threads: int,
        batch_size: int,
        use_gpu: bool,
        job: Mapping[str, Any] | None = None,
    ) -> None:
        self._output, self._batch_size, self._job = output, batch_size, job
        self._remedy = f"give fewer images at a time than --batch-size {batch_size}"
        self._turn = threading.Lock()
        self._error: Exception | None = None
        try:
            self._load(files, source, threads, use_gpu)
        except Exception as error:
            self._error = error

    def _load(self, files: dict[str, bytes], source: str, threads: int, use_gpu: bool) -> None:
        """Loads the model and computes an image with it."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        set_up_tensorflow(threads, use_gpu)
        if use_gpu:
            require_gpu("use_gpu")
            multiply_on_gpu("use_gpu")
        with tempfile.TemporaryDirectory() as folder:
            for path, data in files.items():
                (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / path).write_bytes(data)
            model = RegisteredModel.from_folder(Path(folder), source, trust=True)  # the job has checked it
            self._apply, self._names = model.load(), model.label_names
            with memory_errors(self._remedy):
                self._apply(np.zeros((1, *model.image_shape), np.uint8))
        self._device = used_device()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Classifies one part and writes its results.

        Args:
            batch: The part, as `read` returns it.

        Returns:
            A table with one row: `rows` and `errors` are counts, `began` and `ended` are seconds since 1970, `device`
            is the name of the device.

        Raises:
            ValueError: If the model gives no probabilities, or another job has claimed the output.
            GpuError: If TensorFlow cannot compute on the GPU that was asked for.
            OutOfMemoryError: If the device has too little memory for the model or a batch.
        """
        if self._error:
            raise self._error
        rows = unpacked(batch)
        part = rows["part"][0].as_py()
        images = rows["image"].combine_chunks().to_numpy_ndarray()
        starts = range(0, len(images), self._batch_size)
        with self._turn, memory_errors(self._remedy):
            began = time.time()
            probabilities = np.concatenate([self._apply(images[i : i + self._batch_size]) for i in starts])
        is_finite = np.isfinite(probabilities).all(axis=1)
        errors = pc.if_else(pa.array(is_finite), rows["error"], pc.coalesce(rows["error"], pa.scalar(NOT_FINITE)))
        broken = errors.is_valid().to_numpy()
        winner = probabilities.argmax(axis=1)
        # Lists of variable size, because pyarrow 25 cannot read null values of fixed-size lists from Parquet.
        offsets = np.concatenate([[0], np.cumsum(np.where(broken, 0, len(self._names)))]).astype(np.int32)
        flat = pa.array(probabilities[~broken].reshape(-1), pa.float32())
        result = pa.table(
            {
                "row_id": rows["row_id"],
                "name": rows["name"],
                "class_name": pa.array(np.array(self._names)[winner], pa.string(), mask=broken),
                "class_index": pa.array(winner, pa.int32(), mask=broken),
                "probabilities": pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(broken)),
                "error": errors,
            }
        )
        if self._job is not None:
            check_claim(self._output, self._job)
            result = result.replace_schema_metadata({DIGEST_KEY: digest_of(self._job)})
        sink = pa.BufferOutputStream()
        pq.write_table(result, sink, compression="zstd")
        # The write is atomic: if the file exists, the part is done.
        self._output.write_bytes(file_name(part), sink.getvalue().to_pybytes())
        counts = {"rows": [len(images)], "errors": [int(broken.sum())]}
        return pa.table(counts | {"began": [began], "ended": [time.time()], "device": [self._device]})


def count_errors(output: Storage, job: Mapping[str, Any], parts: Iterable[int]) -> int:
    """Number of images with an error in the results of `parts`, from the statistics in the Parquet files.

    Raises:
        ValueError: If one of them is of another job.
    """
    count = 0
    for part in parts:
        with output.filesystem.open_input_file(output.fs_path(file_name(part))) as file:
            metadata = pq.ParquetFile(file).metadata
            check_part(output, job, file_name(part), metadata.metadata)
            column = metadata.schema.names.index("error")
            groups = (metadata.row_group(i).column(column) for i in range(metadata.num_row_groups))
            count += sum(group.num_values - group.statistics.null_count for group in groups)
    return count
