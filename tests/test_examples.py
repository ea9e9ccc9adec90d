"""The examples run as they are, in a folder of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("script", "accuracy"),
    [
        ("keras_two_processes.py", r"200 rows predicted, (\d+)% of them right"),
        ("ray_train_own_model.py", r"validation accuracy after epoch 5: (\d+)\.\d%"),
    ],
)
def test_an_example_trains(script: str, accuracy: str, tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TF_CONFIG", None)
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(accuracy, done.stdout)
    assert found, done.stdout
    assert int(found[1]) >= 80


def test_of_this_project_the_examples_use_multiworker_only() -> None:
    for script in EXAMPLES.glob("*.py"):
        imported = re.findall(
            r"^\s*(?:from|import) ((?:pipeline|perceiver|tune)\b.*)$", script.read_text(), re.MULTILINE
        )
        assert imported == ["pipeline import multiworker"], script
