"""What a model gives has to be probabilities of its classes; otherwise it is refused, and what it gives is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from image_models import IMAGE_SHAPE, save_model

from pipeline.registry.fetch import RegisteredModel
from pipeline.registry.probabilities import checked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            np.full((1, 4), 0.25, np.float32),
            r"gives float32 \(1, 4\) for 1 image and 3 label_names: let it give .* numbers \(1, 3\)",
        ),
        (np.full(3, 1 / 3), r"gives float64 \(3,\) for 1 image and 3 label_names"),
        ({"dense": np.full((1, 3), 1 / 3)}, r"gives object \(\) for 1 image"),
        (np.array([["a", "b", "c"]]), r"gives <U1 \(1, 3\) for 1 image"),
        (np.array([[-2.5, 1.0, 2.5]]), r"those of an image are -2\.5 to 2\.5, with the sum 1: end the model in a soft"),
        (np.array([[0.5, 0.9, 0.2]]), r"those of an image are 0\.2 to 0\.9, with the sum 1\.6: end the model"),
        (np.zeros((1, 3)), r"those of an image are 0 to 0, with the sum 0: end the model in a softmax$"),
    ],
    ids=["too many", "no axis for images", "by name", "texts", "logits", "independent", "zeros"],
)
def test_other_output_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model = 'models:/m/1': gives .*{message.removeprefix('gives ')}"):
        checked(given, 1, 3, "models:/m/1")


def test_probabilities_are_taken() -> None:
    rounded = np.array([[0.333, 0.333, 0.33], [1, 0, 0]], np.float16)
    assert checked(rounded, 2, 3, "models:/m/1") is rounded
    broken = np.array([[np.nan, 0.5, 0.5], [-np.inf, 7, 2], [0.2, 0.3, 0.5]])
    assert checked(broken, 3, 3, "models:/m/1") is broken, "an image without finite numbers is reported by itself"
    with pytest.raises(ValueError, match=r"no probabilities: those of an image are 0\.3 to 0\.5, with the sum 1\.3"):
        checked(np.concatenate([broken, [[0.3, 0.5, 0.5]]]), 4, 3, "models:/m/1")


def test_each_call_of_a_loaded_model_is_checked(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    images = np.zeros((2, *IMAGE_SHAPE), np.uint8)
    assert RegisteredModel.from_folder(tmp_path / "model", "m").load()(images).shape == (2, 3)
    described = yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())
    described["metadata"]["label_names"] = ["left", "right"]
    (tmp_path / "model" / "MLmodel").write_text(yaml.safe_dump(described))
    with pytest.raises(ValueError, match=r"^model = 'm': gives float32 \(2, 3\) for 2 images and 2 label_names"):
        RegisteredModel.from_folder(tmp_path / "model", "m").load()(images)
