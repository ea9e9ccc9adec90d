"""The check of the shuffle window before anything is started."""

from dataclasses import replace

import pytest

from pipeline.driver.window import check_window
from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import cifar100, quickstart


def with_window(config: PipelineConfig, num_shards: int, window_mb: int) -> PipelineConfig:
    data, train = replace(config.data, num_shards=num_shards), replace(config.train, shuffle_window_mb=window_mb)
    return replace(config, data=data, train=train)


def test_a_window_without_room_for_two_shards_is_refused_with_the_size_that_would_do() -> None:
    # 45,000 rows of 3,072 bytes in 10 shards: 13.2 MiB each.
    with pytest.raises(
        ValueError, match=r"shuffle_window_mb = 20 has no room .* 13\.\d MiB .* give at least 27, or more"
    ):
        check_window(with_window(cifar100(), num_shards=10, window_mb=20))
    check_window(with_window(cifar100(), num_shards=10, window_mb=27))
    check_window(with_window(cifar100(), num_shards=20, window_mb=20))


def test_rows_that_fit_the_window_need_no_shards_in_it() -> None:
    check_window(with_window(quickstart(), num_shards=1, window_mb=1))  # 1,300 rows of 64 bytes
