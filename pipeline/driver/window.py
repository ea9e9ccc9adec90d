"""The check of the shuffle window that needs no row: before anything is started, and in a dry run."""

import numpy as np

from pipeline.data.order import MIB, StreamOrder, fits_window
from pipeline.data.shards import shard_count
from pipeline.settings.config import PipelineConfig


def check_window(config: PipelineConfig) -> None:
    """Checks that `train.shuffle_window_mb` has room for two shards of the training rows, if these do not fit it.

    The exact sizes are known to `preprocess`, and are checked once more before the workers start.

    Raises:
        ValueError: if it has not; names the size that would do.
    """
    shape, train = config.model.image_shape, config.train
    row_bytes = int(np.prod(shape))
    # The split rounds in every class, so the number of rows is not known exactly.
    least, most = (config.training_rows + sign * config.model.num_classes for sign in (-1, 1))
    if least <= 0 or fits_window(least, shape, train.shuffle_window_mb):
        return
    smallest_shard = max(1, least // shard_count(most, config.data.num_shards, row_bytes))
    StreamOrder.of((smallest_shard,), row_bytes, train.global_batch_size, train.shuffle_window_mb * MIB, train.seed)
