"""What happens to one part of a batch inference: it is read, classified by an actor, and its results appear whole.

A module of its own, and not of the command, so that the processes of Ray import it instead of getting it pickled.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.image_parts import Part, read_part
from pipeline.registered_model import describe
from pipeline.storage import Storage


def file_name(part: int) -> str:
    """Where the results of a part are."""
    return f"part-{part:06d}.parquet"


def read(batch: dict[str, np.ndarray], **arguments: Any) -> pa.Table:
    """The rows of the one part in `batch`, as `pipeline.image_parts.read_part` reads it."""
    return read_part(Part.from_json(str(batch["part"][0])), **arguments)


class Classifier:
    """An actor that holds the model and classifies parts.

    Args:
        files: of the model, by path: the folder of the driver need not be there on another host.
        source: what identifies it.
        output: storage of the results.
        threads: that TensorFlow may use.
        batch_size: images in a call of the model.
    """

    def __init__(self, files: dict[str, bytes], source: str, output: Storage, threads: int, batch_size: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            for path, data in files.items():
                (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / path).write_bytes(data)
            model = describe(Path(folder), source)
            self._apply, self._names = model.load(), model.label_names
            self._apply(np.zeros((1, *model.image_shape), np.uint8))
        self._output, self._batch_size = output, batch_size

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Classifies and writes one part; returns what the driver wants to know of it, as a table of one row."""
        began, part = time.time(), rows["part"][0].as_py()
        images = rows["image"].combine_chunks().to_numpy_ndarray()
        starts = range(0, len(images), self._batch_size)
        probabilities = np.concatenate([self._apply(images[i : i + self._batch_size]) for i in starts])
        broken = rows["error"].is_valid().to_numpy()
        winner = probabilities.argmax(axis=1)
        # Lists of no fixed size: of those, pyarrow 25 cannot read missing ones back.
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
        # Appears whole or not at all: that is what makes the part done.
        self._output.write_bytes(file_name(part), sink.getvalue().to_pybytes())
        return pa.table(
            {"rows": [len(images)], "errors": [int(broken.sum())], "began": [began], "ended": [time.time()]}
        )


def count_errors(output: Storage, parts: Iterable[int]) -> int:
    """Number of images with an error in the results of `parts`, from the statistics of their files."""
    count = 0
    for part in parts:
        with output.filesystem.open_input_file(output.fs_path(file_name(part))) as file:
            metadata = pq.ParquetFile(file).metadata
            column = metadata.schema.names.index("error")
            groups = (metadata.row_group(i).column(column) for i in range(metadata.num_row_groups))
            count += sum(group.num_values - group.statistics.null_count for group in groups)
    return count
