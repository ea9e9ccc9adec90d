"""The actor of batch inference: classifies the images of one part and writes its results as one file.

Ray's processes import this module. If its classes were defined in the command itself, Ray would have to pickle them.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.image_files import Part, read_part
from pipeline.devices import memory_errors, multiply_on_gpu, require_gpu, set_up_tensorflow, used_device
from pipeline.registry.fetch import RegisteredModel
from pipeline.storage import Storage

PART_PREFIX = "part-"


def file_name(part: int) -> str:
    """Name of the file with the results of a part."""
    return f"{PART_PREFIX}{part:06d}.parquet"


def read(batch: dict[str, np.ndarray], **arguments: Any) -> pa.Table:
    """Reads the rows of the only part in `batch`; `arguments` are those of `read_part`."""
    return read_part(Part.from_json(str(batch["part"][0])), **arguments)


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

    Raises:
        GpuError: If TensorFlow cannot compute on the GPU that was asked for.
    """

    def __init__(
        self, files: dict[str, bytes], source: str, output: Storage, threads: int, batch_size: int, use_gpu: bool
    ) -> None:
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
            self._remedy = f"give fewer images at a time than --batch-size {batch_size}"
            with memory_errors(self._remedy):
                self._apply(np.zeros((1, *model.image_shape), np.uint8))
        self._output, self._batch_size, self._device = output, batch_size, used_device()
        self._turn = threading.Lock()

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Classifies one part and writes its results.

        Args:
            rows: Rows of the part, as `read_part` returns them.

        Returns:
            A table with one row: `rows` and `errors` are counts, `began` and `ended` are seconds since 1970, `device`
            is the name of the device.

        Raises:
            OutOfMemoryError: If the device has too little memory for a batch.
        """
        part = rows["part"][0].as_py()
        images = rows["image"].combine_chunks().to_numpy_ndarray()
        starts = range(0, len(images), self._batch_size)
        with self._turn, memory_errors(self._remedy):
            began = time.time()
            probabilities = np.concatenate([self._apply(images[i : i + self._batch_size]) for i in starts])
        broken = rows["error"].is_valid().to_numpy()
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
                "error": rows["error"],
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(result, sink, compression="zstd")
        # The write is atomic: if the file exists, the part is done.
        self._output.write_bytes(file_name(part), sink.getvalue().to_pybytes())
        counts = {"rows": [len(images)], "errors": [int(broken.sum())]}
        return pa.table(counts | {"began": [began], "ended": [time.time()], "device": [self._device]})


def count_errors(output: Storage, parts: Iterable[int]) -> int:
    """Number of images with an error in the results of `parts`, from the statistics in the Parquet files."""
    count = 0
    for part in parts:
        with output.filesystem.open_input_file(output.fs_path(file_name(part))) as file:
            metadata = pq.ParquetFile(file).metadata
            column = metadata.schema.names.index("error")
            groups = (metadata.row_group(i).column(column) for i in range(metadata.num_row_groups))
            count += sum(group.num_values - group.statistics.null_count for group in groups)
    return count
