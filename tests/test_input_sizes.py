"""benchmarks/input_sizes.py at sizes that take seconds."""

import input_sizes
import keras
import pytest
from benchmark_run import benchmark


@pytest.mark.slow
def test_input_sizes_of_a_perceiver_and_a_vit() -> None:
    models = ("--models", "Perceiver, 4 x 4 patches", "ViT, 4 x 4 patches")
    table, result = benchmark("input_sizes", *models, "--sides", "8", "16", "--pixels", "128", "--rounds", "1")
    assert "for each image; the last two beside the smallest images" in table
    rows = result["rows"]
    assert [(row["side"], row["batch"]) for row in rows] == [(8, 2), (16, 1)] * 2
    assert rows[0]["parameters"] == rows[1]["parameters"], "a Perceiver has the same weights at every size"
    assert rows[1]["mmacs"] / rows[0]["mmacs"] < rows[3]["mmacs"] / rows[2]["mmacs"]
    assert all(row["milliseconds_an_image"] >= row["fastest"] > 0 for row in rows)
    assert all(row["mib_an_image"] > 0 for row in rows)


def test_memory_is_what_the_backward_pass_reads() -> None:
    images = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(5, 3, activation="relu")(x)
    model = keras.Model(images, keras.layers.Dense(7)(keras.layers.Flatten()(x)))
    # What is convolved, and what comes out of the ReLU, in float32.
    assert input_sizes.kept_bytes(model, (8, 8, 3)) == 4 * (8 * 8 * 3 + 6 * 6 * 5)
