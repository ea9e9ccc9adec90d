"""Trains as one worker in the calling process: a trial of the search, or one Ray Train worker."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from perceiver.config import PerceiverConfig
from pipeline.data.rows import Rows
from pipeline.data.streamed_rows import StreamedRows
from pipeline.devices import memory_errors, precision_advice, require_gpu, set_up_tensorflow
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel
from pipeline.training.worker import InitialModelError, Interrupted, NotFinite, OwnModelError, Worker
from pipeline.workflow.task import StoppedEarly

if TYPE_CHECKING:
    from pipeline.training.kept_models import KeptModels


class TrainingError(RuntimeError):
    """The training cannot succeed if it is tried again."""


def train_in_process(
    model: PerceiverConfig | OwnModel,
    config: TrainingConfig,
    train: Rows | StreamedRows,
    validation: Rows | StreamedRows,
    worker: Worker,
    class_counts: Sequence[int] | None = None,
    kept: "KeptModels | None" = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Trains as `worker` in this process, on `config.cpus_per_worker` CPUs; see `pipeline.training.fit.fit`.

    Args:
        model, config, train, validation, worker, class_counts, kept: Those of `fit`.
        warn: Called with a line before the training if the device is slow at the precision.

    Raises:
        StoppedEarly: after a stop request.
        TrainingError: if the loss became NaN or infinite, the initial weights do not fit the model, or a
            model of one's own cannot be trained as it is.
        GpuError: if TensorFlow cannot compute on the GPU that `config` asks for.
        OutOfMemoryError: if the memory of the device does not suffice.
        CorruptFileError, OSError: if a shard of streamed rows cannot be read.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Imported here, since processes that only start workers do without TensorFlow.
    import tensorflow as tf

    from pipeline.training.fit import fit
    from pipeline.training.parts import num_parts

    threads = max(1, int(config.cpus_per_worker))
    set_up_tensorflow(threads, config.use_gpu, divides_operations=num_parts(model, config) == 1)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.use_gpu:
        require_gpu("train.use_gpu")
    advice = precision_advice(config.precision, config.use_gpu, isinstance(model, PerceiverConfig))
    if warn and advice:
        warn(advice)
    try:
        with memory_errors(_memory_remedy(config, worker.num_workers)):
            fit(model, config, train, validation, worker, class_counts, kept)
    except Interrupted as error:
        raise StoppedEarly from error
    except (InitialModelError, NotFinite, OwnModelError) as error:
        raise TrainingError(str(error)) from error
    except Exception as error:
        for rows in (train, validation):
            if isinstance(rows, StreamedRows) and rows.failure:
                raise rows.failure from error  # without TensorFlow's wrapping
        raise


def _memory_remedy(config: TrainingConfig, num_workers: int) -> str:
    ways = ["--model.remat", "a smaller --train.global-batch-size"]
    if config.precision == "float32":
        ways.insert(0, "--train.precision mixed_bfloat16 (float16 on GPUs before Ampere)")
    return (
        f"a worker has {config.global_batch_size // num_workers} rows of each step: take more workers than "
        f"{num_workers}, or give {', or '.join(ways)}"
    )
