"""The comparison of training steps with other libraries, with this project's own cases alone."""

import os
from pathlib import Path

import pytest
import step_turns

from perceiver import presets
from perceiver.cost import parameter_count


def test_peers_are_compared_with_adamw_of_this_project() -> None:
    speeds = {"this project": 600.0, "this project, Muon": 500.0, "JAX": 200.0, "PyTorch": 400.0}
    rows = [{"case": name, "images_per_second": speed} for name, speed in speeds.items()]
    assert step_turns.ratios_of(rows) == {"muon_step": 1.2, "ratio": 1.5, "quickest_peer": "PyTorch"}
    assert step_turns.ratios_of(rows[:2]) == {"muon_step": 1.2}


@pytest.mark.slow
def test_the_steps_of_this_project_beside_each_other(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = step_turns.compare_steps(
        [], tmp_path, ["mixed_bfloat16"], preset="quickstart", batch=8, rounds=2, steps=2, cores=cores
    )
    assert [row["case"] for row in found["cases"]] == ["this project", "this project, Muon"]
    assert {row["parameters"] for row in found["cases"]} == {parameter_count(presets.quickstart())}
    assert all(row["fastest"] >= row["images_per_second"] > 0 for row in found["cases"])
    assert not list(tmp_path.iterdir()), "the project's own environment is used"
