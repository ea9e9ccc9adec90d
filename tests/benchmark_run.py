"""Runs a benchmark as a person does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str, *args: str) -> tuple[str, Any]:
    """What a benchmark printed before its last line, and that line's contents."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    table, _, line = done.stdout.rstrip().rpartition("\n")
    return table, json.loads(line)
