"""`max_pixels` holds for every form of input, in training and in batch inference."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.config import MAX_PIXELS, DatasetConfig
from pipeline.data.image_decoding import most_bytes
from pipeline.data.image_files import list_parts, read_part
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_images
from pipeline.fields import keyed
from pipeline.inference.config import PredictOptions

SIDE = 12
IMAGES = np.random.default_rng(1).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write(kind: str, folder: Path) -> str:
    files = [encoded(image) for image in IMAGES]
    if kind == "folders":
        for number, data in enumerate(files):
            path = folder / f"class {number % 2}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(data)
        return str(folder)
    folder.mkdir(exist_ok=True)
    path = folder / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": files, "label": np.arange(20) % 2}), path)
    elif kind == "npz":
        np.savez(path, images=IMAGES, labels=np.arange(20) % 2)
    else:
        with tarfile.open(path, "w") as tar:
            for number, data in enumerate(files):
                for suffix, content in (("png", data), ("cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("kind", ["folders", "parquet", "tar", "npz"])
def test_training_obeys(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "images")
    found = find_images(DatasetConfig("files", path=path, max_pixels=SIDE**2), str(tmp_path))
    raw = load_files(found)
    assert len(raw.train) + len(raw.test) == 20
    with pytest.raises(ValueError, match=r"pixels that are decoded|data.max_pixels = 143"):
        find_images(DatasetConfig("files", path=path, max_pixels=SIDE**2 - 1), str(tmp_path))


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_batch_inference_obeys(kind: str, tmp_path: Path) -> None:
    source = list_parts(write(kind, tmp_path), 64)
    shape = (SIDE, SIDE, 3)
    for limit, errors in ((SIDE**2, 0), (SIDE**2 - 1, 20)):
        table = read_part(source.parts[0], source.kind, source.root, shape, None, limit)
        assert len(table) - table["error"].null_count == errors
    assert "has more than the 143 pixels" in table["error"][0].as_py()


def test_a_decoder_that_was_told_less_by_an_earlier_command_is_told_anew(tmp_path: Path) -> None:
    path = write("folders", tmp_path / "images")
    for limit in (MAX_PIXELS, SIDE**2 - 1, MAX_PIXELS):
        config = DatasetConfig("files", path=path, max_pixels=limit)
        if limit == MAX_PIXELS:
            assert find_images(config, str(tmp_path)).found is not None
        else:
            with pytest.raises(ValueError, match="20 of 20 images cannot be used"):
                find_images(config, str(tmp_path))


def test_the_default_is_no_part_of_a_key_and_another_value_is() -> None:
    assert "max_pixels" not in keyed(DatasetConfig("files", path="x"))
    assert keyed(DatasetConfig("files", path="x", max_pixels=5))["max_pixels"] == 5
    assert most_bytes(5) == most_bytes(MAX_PIXELS) < most_bytes(2 * MAX_PIXELS)
    with pytest.raises(ValueError, match=r"data.max_pixels = 0: give 1 to 2\*\*30"):
        DatasetConfig("files", path="x", max_pixels=0)
    with pytest.raises(ValueError, match=r"data.max_pixels = 5: it is of --data.source files"):
        DatasetConfig("digits", max_pixels=5)
    with pytest.raises(ValueError, match=r"max_pixels = 0: give 1 to 2\*\*30"):
        PredictOptions("m", "i", "o", max_pixels=0)
