"""The models that the Perceiver is compared with have the sizes that are published, and the comparison goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparison
import comparison_models
import pytest
from benchmark_run import benchmark

from perceiver import presets
from perceiver.cost import macs_per_image, parameter_count
from pipeline.own_model import OwnModel


def size(name: str, **arguments: Any) -> dict[str, int]:
    return comparison.size_of(OwnModel(comparison_models.BUILDERS[name], arguments))


def test_the_perceiver_has_the_size_of_its_preset() -> None:
    config = presets.cifar100()
    assert size("perceiver") == {"macs": macs_per_image(config), "parameters": parameter_count(config)}
    few = replace(config, num_latents=4)
    assert size("perceiver", num_latents=4) == {"macs": macs_per_image(few), "parameters": parameter_count(few)}


def test_cct_has_the_size_that_its_authors_give() -> None:
    found, tokens, width = size("cct"), 64, 128
    convolutions = 1024 * 27 * 64 + 256 * 9 * 64 * width
    of_a_block = tokens * (4 + 2) * width**2 + 2 * tokens**2 * width
    pooling = 2 * tokens * width
    assert found["macs"] == convolutions + 2 * of_a_block + pooling + width * 100
    # 33 MMAC and 0.28 million parameters with 10 classes, by a counter that sees no products without weights.
    without_weights = 2 * 2 * tokens**2 * width + tokens * width
    assert round((found["macs"] - without_weights) / 1e6) == 33
    assert (found["parameters"] - 90 * (width + 1)) / 1e6 == pytest.approx(0.28, abs=0.01)


def test_the_convolutional_models_have_the_size_that_is_counted_by_hand() -> None:
    cells = 31**2, 15**2, 7**2, 3**2
    first = cells[0] * 24 * 4 * 3 + cells[0] * 64 * 9 * 24 + cells[1] * 64 * 9 * 64
    second = cells[1] * 256 * 9 * 64 + cells[2] * 256 * 9 * 256
    third = cells[2] * 256 * 9 * 256 + cells[3] * 256 * 9 * 256
    assert size("cnn")["macs"] == first + second + third + 256 * 100
    # Half the cells of a side and twice the channels: the same cost.
    one, residual = 1024 * 9 * 32 * 64, 256 * 9 * 64 * 64
    assert size("resnet9")["macs"] == 1024 * 27 * 32 + 3 * one + 4 * residual + 256 * 100


def test_vit_costs_what_the_preset_does() -> None:
    tokens, width = 64, 128
    of_a_block = tokens * (4 + 4) * width**2 + 2 * tokens**2 * width
    found = size("vit")
    assert found["macs"] == tokens * 48 * width + 8 * of_a_block + width * 100
    assert found["macs"] == pytest.approx(macs_per_image(presets.cifar100()), rel=0.05)


@pytest.mark.parametrize("name", ["perceiver", "cnn", "resnet9", "cct", "vit"])
def test_images_of_twice_the_side_cost_more(name: str) -> None:
    given, resized = size(name), size(name, resize_to=64)
    assert resized["macs"] > 1.5 * given["macs"]
    assert size(name, resize_to=32)["macs"] == given["macs"]


def test_epochs_are_those_that_come_nearest_to_the_budget() -> None:
    assert comparison.epochs_for(0.58, 48_800_000, 45_000) == 44
    assert comparison.epochs_for(0.001, 48_800_000, 45_000) == 1


@pytest.mark.slow
def test_the_comparison_trains_and_goes_on_with_what_is_missing(
    tmp_path: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(ray_folder))
    record = tmp_path / "record.jsonl"
    few = ("comparison", "--preset", "quickstart", "--pflop", "1e-5", "--record", str(record))
    small = ('{"width": 4}', "--", "--train.num-workers", "1")
    table, result = benchmark(*few, "--models", "resnet9", "--arguments", *small)
    assert "validation" in table
    (run,) = result["runs"]
    assert run["test"]["num_examples"] == 360
    assert run["epochs"] == len(run["curve"]) == comparison.epochs_for(1e-5, round(run["mmacs"] * 1e6), 1295)
    assert run["pflop"] == pytest.approx(1e-5, rel=0.5)
    _, again = benchmark(*few, "--models", "resnet9", "--seeds", "0", "1", "--arguments", *small)
    assert again["runs"][0] == run
    assert [(each["model"], each["seed"]) for each in again["runs"]] == [("resnet9", 0), ("resnet9", 1)]
    assert [json.loads(line) for line in record.read_text().splitlines()] == again["runs"]
