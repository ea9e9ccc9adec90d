"""Which differences between two computations of a step are found, and what workers send each other for it."""

import numpy as np
import pytest
import tensorflow as tf

from pipeline.multiworker.comparison import difference, largest_changes
from pipeline.multiworker.exchange import messages_of_all_workers, of_all_workers
from pipeline.multiworker.few_rows import uneven_parts
from pipeline.multiworker.precision import rounded_otherwise

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("alone", "together", "found"),
    [
        ([1.0, 2.0], [1.0, 2.0], ""),
        ([1.0, 2.0], [1.0, 2.001], ""),
        ([1.0, 2.0], [1.0, 2.01], "is 2 for .* and 2.01 when"),
        ([1.0, NAN], [1.0, NAN], ""),
        ([1.0, INF], [1.0, INF], ""),
        ([1.0, INF], [1.1, INF], "is 1 for"),
        ([1.0, 2.0], [1.0, NAN], "is 2 for .* and nan when"),
        ([NAN, 2.0], [1.0, 2.0], "is nan for"),
        ([1.0, 2.0], [1.0], r"of shape \(2,\)"),
        ([True, False], [True, True], "is False for"),
        ([b"a", b"b"], [b"a", b"c"], "is b'b' for .* and b'c' when"),
        ([], [], ""),
        (np.array([3, 5], np.uint32), np.array([3, 4], np.uint32), "is 5 for"),
        (np.array([3, 4], np.uint32), np.array([3, 5], np.uint32), "is 4 for"),
    ],
)
def test_a_difference_is_found(alone: object, together: object, found: str) -> None:
    message = difference({"log loss": np.asarray(alone)}, {"log loss": np.asarray(together)}, [1, 7])
    assert bool(message) == bool(found)
    if found:
        with pytest.raises(ValueError, match=found):
            raise ValueError(message)


def test_what_rounding_changes_is_allowed() -> None:
    alone, together = {"log loss": np.array([1.0])}, {"log loss": np.array([1.2])}
    rounding = largest_changes(alone, {"log loss": np.array([0.94])})
    assert rounding["log loss"] == pytest.approx(0.06)
    assert not difference(alone, together, [1, 7], rounding)
    assert difference(alone, together, [1, 7], {"log loss": 0.04})


def test_a_value_that_is_missing_is_found() -> None:
    assert "log f1 is a value" in difference({"log f1": np.ones(1)}, {}, [1, 7])
    assert "nothing" in difference({}, {"log f1": np.ones(1)}, [1, 7])


def test_every_worker_gets_a_row_before_another_gets_two() -> None:
    assert uneven_parts(8, 2) == [1, 7]
    assert uneven_parts(8, 3) == [1, 1, 6]
    assert uneven_parts(2, 3) == [1, 1, 0]


def test_numbers_are_rounded_to_their_neighbours() -> None:
    value = tf.constant([1.5, -3.0, 0.0])
    moved = rounded_otherwise(value, 0).numpy()
    assert moved[2] == 0
    assert (moved[:2] != value[:2].numpy()).all()
    np.testing.assert_allclose(moved, value, rtol=2.5e-7)


@pytest.mark.parametrize("message", [b"", b"x", b"four", b"\x00\xff\x80 and more"])
def test_a_message_arrives_as_it_was(message: bytes) -> None:
    strategy = tf.distribute.get_strategy()
    assert messages_of_all_workers(strategy, message) == [message]
    assert of_all_workers(strategy, -1) == [-1]
