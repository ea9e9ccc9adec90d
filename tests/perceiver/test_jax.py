"""The model with Keras's JAX backend, in a separate process; skipped unless `jax` is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from training_steps import CONFIG, losses_from

from perceiver import Perceiver


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_ten_steps_equal_tensorflow(tmp_path: Path) -> None:
    model = Perceiver(**asdict(CONFIG))
    model.build()
    np.savez(tmp_path / "weights.npz", *model.get_weights())
    script = Path(__file__).parents[1] / "training_steps.py"
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "weights.npz")],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    losses = json.loads(process.stdout.splitlines()[-1])
    expected = losses_from(model.get_weights())
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(losses, expected, atol=1e-4)
