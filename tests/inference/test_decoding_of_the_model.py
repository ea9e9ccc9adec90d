"""Batch inference decodes as the training of the model did: copies of an image in other files get the same class."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_models import IMAGE_SHAPE, save_model
from PIL import ExifTags, Image
from rich.console import Console

from pipeline.inference.config import PredictOptions
from pipeline.inference.job import predict
from pipeline.registry.fetch import RegisteredModel


def write_copies(folder: Path) -> dict[str, str]:
    """Writes images and copies of them; returns of each copy the name of its image."""
    rng = np.random.default_rng(0)
    colored = rng.integers(0, 256, IMAGE_SHAPE, dtype=np.uint8)
    grey = rng.integers(0, 256, IMAGE_SHAPE[:2], dtype=np.uint8)
    folder.mkdir()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be shown turned clockwise by 90 degrees
    wide = rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    wide[:, 5:11] = colored
    Image.fromarray(colored).save(folder / "colored.png")
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(colored))).save(folder / "turned.png", exif=turned)
    Image.fromarray(np.dstack([colored, np.full(IMAGE_SHAPE[:2], 255, np.uint8)])).save(folder / "opaque.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(grey.astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(grey.astype(np.int32)).save(folder / "int32.tif")
    half = np.dstack([np.zeros_like(colored), np.full(IMAGE_SHAPE[:2], 127, np.uint8)])
    Image.fromarray(half).save(folder / "half.png")
    Image.fromarray(np.full(IMAGE_SHAPE, 128, np.uint8)).save(folder / "over white.png")
    copies = {
        name: "grey.png" if name == "deep.png" else "colored.png" for name in ("turned.png", "opaque.png", "deep.png")
    }
    return copies | {"half.png": "over white.png"}


@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_copies_in_other_files_get_the_same_class(tmp_path: Path) -> None:
    copy_of = write_copies(tmp_path / "images")
    found, errors = {}, {}
    for kind, metadata in (("before", {}), ("cropped", {"decoding": {"resize": "crop", "background": 255}})):
        save_model(tmp_path / kind, **metadata)  # type: ignore[arg-type]
        model = RegisteredModel.from_folder(tmp_path / kind, kind)
        assert model.resize == (metadata["decoding"]["resize"] if metadata else None)
        output = tmp_path / f"{kind} output"
        options = PredictOptions(str(tmp_path / kind), str(tmp_path / "images"), str(output), num_actors=1)
        predict(options, Console(file=io.StringIO()))
        table = pq.read_table(output)
        names = table["name"].to_pylist()
        found[kind] = dict(zip(names, table["probabilities"].to_pylist(), strict=True))
        errors[kind] = dict(zip(names, table["error"].to_pylist(), strict=True))
        for copy, name in copy_of.items():
            assert found[kind][copy] == found[kind][name]
        for name in ("float.tif", "int32.tif"):
            assert "for which no range of levels is defined: convert it to 8 or 16 bits" in errors[kind][name]
    assert errors["before"]["wide.png"] == "is of 16 x 8 pixels, the model takes 6 x 8: give --resize"
    assert found["cropped"]["wide.png"] == found["cropped"]["colored.png"], "as in its training"
