"""The commands of docs/data.md, from a folder to a served model, run as they are written there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def write_digits(folder: Path) -> None:
    """Digits as PNG and JPEG files of two sizes in folders of classes, and ten without a class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    (folder / "unknown").mkdir()
    for number, (image, label) in enumerate(zip(digits.images[:1010], digits.target, strict=False)):
        side = 24 if number % 3 else 20
        picture = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).resize((side, side))
        name = f"{number:04d}.{'png' if number % 2 else 'jpg'}"
        place = folder / "flowers" / str(label) if number < 1000 else folder / "unknown"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / name)


@pytest.mark.slow
def test_from_a_folder_to_a_served_model(tmp_path: Path, ray_folder: Path) -> None:
    write_digits(tmp_path)
    for name in ("pipeline", "perceiver", "tune"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    text = (ROOT / "docs" / "data.md").read_text()
    found = re.search(r"## From a folder to a served model.*?```bash\n(.*?)```", text, re.DOTALL)
    assert found is not None
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", found[1]],
        cwd=tmp_path,
        env=os.environ | {"RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(tmp_path), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "path: " in done.stdout
    assert "sizes: smallest 20 x 20, median 24 x 24, largest 24 x 24 pixels; 1,000 grey, 0 in colour" in done.stdout
    evaluated = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"model"')))
    assert evaluated["is_registered_test_split"]
    assert evaluated["top1"] > 0.85
    assert "10 images done, 0 of them could not be read" in done.stdout
    predicted = pq.read_table(tmp_path / "predicted")
    assert predicted["error"].null_count == 10
    answer = json.loads(done.stdout[done.stdout.rindex('{"predictions"') :])
    np.testing.assert_allclose(answer["predictions"][0], predicted["probabilities"][0].as_py(), atol=1e-4)
