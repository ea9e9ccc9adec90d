"""The decoder: every kind of file gives the right pixels or a named error; the uncleaned folder as a table."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.data.config import DatasetConfig
from pipeline.data.image_decoding import ImageError, Resize, decode, fit_array, read_header
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_images, read_headers
from pipeline.data.labelled_images import list_images
from pipeline.storage import Storage

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (8, 8), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float) / 255
    if pixels.ndim == 3:
        share = share[..., np.newaxis]
    return pixels * share + 255 * (1 - share)


def turned(orientation: int, kind: str = "PNG") -> bytes:
    """`COLOR` stored as a camera does that was held so, with its EXIF orientation."""
    back = {
        1: lambda image: image,
        2: np.fliplr,
        3: lambda image: np.rot90(image, 2),
        4: np.flipud,
        5: lambda image: image.transpose(1, 0, 2),
        6: lambda image: np.rot90(image, 1),
        7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
        8: lambda image: np.rot90(image, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(back(COLOR))), kind, exif=exif, lossless=True)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    np.testing.assert_array_equal(decode(turned(orientation, kind), (8, 8, 3), None), COLOR)
    wide = Image.new("RGB", (9, 4))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    header = read_header(io.BytesIO(encoded(wide, kind, exif=exif)))
    assert (header.width, header.height) == ((4, 9) if orientation >= 5 else (9, 4))


def test_transparency_is_laid_over_white() -> None:
    rgba = Image.fromarray(np.dstack([COLOR, ALPHA]))
    np.testing.assert_allclose(decode(encoded(rgba), (8, 8, 3), None), over_white(COLOR, ALPHA), atol=1)
    la = Image.fromarray(np.dstack([GREY, ALPHA]))
    assert la.mode == "LA"
    np.testing.assert_allclose(decode(encoded(la), (8, 8, 1), None)[..., 0], over_white(GREY, ALPHA), atol=1)
    palette = Image.fromarray(COLOR).quantize(16)
    expected = np.array(palette.convert("RGB"))
    expected[np.array(palette) == 3] = 255
    np.testing.assert_array_equal(decode(encoded(palette, transparency=3), (8, 8, 3), None), expected)
    grey16 = Image.fromarray(GREY.astype(np.uint16) * 257)
    clear = int(GREY[0, 0]) * 257
    expected = np.where(GREY == GREY[0, 0], 255, GREY)
    np.testing.assert_array_equal(decode(encoded(grey16, transparency=clear), (8, 8, 1), None)[..., 0], expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_and_not_clipped(kind: str) -> None:
    levels = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
    data = encoded(Image.fromarray(levels), kind)
    assert Image.open(io.BytesIO(data)).mode in ("I;16", "I")
    expected = np.rint(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode(data, (8, 8, 1), None)[..., 0], expected)
    np.testing.assert_array_equal(decode(data, (8, 8, 3), None), np.repeat(expected[..., np.newaxis], 3, axis=2))
    assert read_header(io.BytesIO(data)).is_grey


def test_cmyk_palette_bilevel_and_animation() -> None:
    cmyk = Image.fromarray(np.full((8, 8, 4), [0, 255, 255, 0], np.uint8), "CMYK")
    for kind, tolerance in (("TIFF", 0), ("JPEG", 3)):
        found = decode(encoded(cmyk, kind), (8, 8, 3), None)
        np.testing.assert_allclose(found, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=tolerance)
    palette = Image.fromarray(COLOR).quantize(256)
    np.testing.assert_array_equal(decode(encoded(palette), (8, 8, 3), None), np.array(palette.convert("RGB")))
    bilevel = Image.fromarray(GREY).convert("1")
    assert set(np.unique(decode(encoded(bilevel), (8, 8, 1), None))) == {0, 255}
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(data, (8, 8, 3), None)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_how_an_image_of_another_shape_is_fitted() -> None:
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, 5:15] = 200
    data = encoded(Image.fromarray(wide))
    fitted = {resize: decode(data, (10, 10, 3), resize) for resize in ("crop", "pad", "stretch")}
    assert (fitted["crop"] == 200).all(), "the centre"
    assert (fitted["pad"][0] == 255).all(), "white above"
    assert fitted["pad"][5, [0, 5]].tolist() == [[0] * 3, [200] * 3], "all of it between"
    assert fitted["stretch"][0, [0, 5]].tolist() == [[0] * 3, [200] * 3]
    for long, line in (((20, 640), np.s_[8, :, :]), ((640, 20), np.s_[:, 8, :])):
        padded = fit_array(np.zeros((*long, 3), np.uint8), (16, 16, 3), "pad")
        assert (padded[line] == 0).all(), "a line of it is left, however long it is"
        assert (padded == 255).sum() == 15 * 16 * 3
    fine = np.zeros((64, 64), np.uint8)
    fine[:, ::2] = 255
    assert np.abs(decode(encoded(Image.fromarray(fine)), (8, 8, 1), "crop").astype(int) - 127).max() <= 40, (
        "antialiased"
    )
    np.testing.assert_array_equal(fit_array(wide, (10, 10, 3), "crop"), fitted["crop"])
    with pytest.raises(ImageError, match="is of 20 x 10 pixels, the model takes 10 x 10: give --resize"):
        decode(data, (10, 10, 3), None)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says that it is very large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(Image.new("RGB", (1, 1)))[33:]


REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb.png": (bomb(20_000, 20_000), "has more than the 89,478,485 pixels"),
    "large.png": (bomb(10_000, 10_000), "has more than the 89,478,485 pixels"),
    "empty.png": (b"", "is of no known image format"),
    "text.jpg": (b"no image at all\n", "is of no known image format"),
    "float.tif": (encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "is a TIFF of mode F, for which no"),
    "int32.tif": (encoded(Image.fromarray(np.zeros((8, 8), np.int32)), "TIFF"), "is a TIFF of mode I, for which no"),
    "lab.tif": (encoded(Image.new("LAB", (8, 8)), "TIFF"), "is a TIFF of mode LAB, for which no"),
    "drawing.png": (encoded(Image.new("RGB", (8, 8)), "EPS"), "is of no known image format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_from_its_header(name: str) -> None:
    data, message = REFUSED[name]
    for read in (lambda: decode(data, (8, 8, 3), "crop"), lambda: read_header(io.BytesIO(data))):
        with pytest.raises(ImageError, match=message):
            read()


def test_a_truncated_file_is_refused_when_it_is_decoded() -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
        with pytest.raises(ImageError, match=r"cannot be decoded: |no known"):
            decode(data[: len(data) // 2], (64, 64, 3), None)


def test_a_folder_that_nobody_cleaned(tmp_path: Path) -> None:
    """Nothing is lost: what is not an image of a class is named by the scan, with the reason."""
    root = tmp_path / "images"
    photo = Image.fromarray(RNG.integers(0, 256, (30, 41, 3), dtype=np.uint8))
    good = {f"turned{number}.png": turned(number) for number in range(1, 9)} | {
        "photo.JPG": encoded(photo, "JPEG"),
        "cmyk.jpeg": encoded(photo.convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(GREY.astype(np.uint16) * 257)),
        "palette.png": encoded(photo.quantize(32)),
        "alpha.png": encoded(Image.fromarray(np.dstack([COLOR, ALPHA]))),
        "moving.gif": encoded(photo.quantize(8), "GIF", save_all=True, append_images=[photo.quantize(4)]),
        "sub/same.png": encoded(photo),
    }
    late = {"cut off.png": encoded(photo)[:-300], "cut off.jpg": encoded(photo, "JPEG", quality=95)[:-300]}
    others = {".hidden.png": b"", "notes.txt": b"text", "Thumbs.db": b"db", "no_suffix": b"?"}
    for folder, files in (("a", good | late | others | {n: d for n, (d, _) in REFUSED.items()}), ("b", good)):
        for name, data in files.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (root / "outside.png").write_bytes(encoded(photo))
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "nowhere.png").symlink_to(root / "gone.png")
    (root / ".git").mkdir()
    (root / ".git" / "x.png").write_bytes(encoded(photo))
    with open(bytes(root / "b") + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(photo))

    listing = list_images(str(root))
    assert listing.tree.left_out == {
        "file of another kind (.db)": ["a/Thumbs.db"],
        "file of another kind (.txt)": ["a/notes.txt"],
        "file of another kind (no suffix)": ["a/no_suffix"],
        "hidden": [".git/x.png", "a/.hidden.png"],
        "image outside of the folders of classes": ["outside.png"],
        "link that leads nowhere": ["a/nowhere.png"],
        "link to a folder above it": ["a/loop"],
        "name is not UTF-8": ["b/caf\\xe9.png"],
    }
    headers = read_headers(listing, Storage(str(tmp_path / "runs")), keep=False)
    assert dict(headers.corrupt).keys() == {f"a/{name}" for name in REFUSED}
    for name, why in headers.corrupt:
        assert why.startswith(REFUSED[name[2:]][1])
    assert (headers.grey, headers.colored) == (2, 2 * len(good) + len(late) - 2)

    settings: dict[str, Any] = {"path": str(root), "image_size": 8, "channels": 3, "test_fraction": 0.25}
    with pytest.raises(
        ValueError, match=rf"max_corrupt = 7: {len(REFUSED)} of 40 .* give --data.max-corrupt 8 to leave"
    ):
        find_images(DatasetConfig("files", **settings, max_corrupt=7), str(tmp_path / "runs"))
    listed = (tmp_path / "runs" / "corrupt.csv").read_text().splitlines()
    assert len(listed) == 1 + len(REFUSED)
    raw = load_files(find_images(DatasetConfig("files", **settings, max_corrupt=10), str(tmp_path / "runs")))
    assert len(raw.train) + len(raw.test) == 2 * len(good)
    assert sum(rows.labels.tolist().count(0) for rows in (raw.train, raw.test)) == len(good)


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_the_policy_reaches_the_rows(resize: Resize, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(Image.fromarray(COLOR[:4])))
    raw = load_files(
        find_images(DatasetConfig("files", path=str(tmp_path), image_size=4, resize=resize), str(tmp_path))
    )
    np.testing.assert_array_equal(raw.train.images[0], decode(encoded(Image.fromarray(COLOR[:4])), (4, 4, 3), resize))
