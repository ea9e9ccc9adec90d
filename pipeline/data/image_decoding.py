"""From the bytes of an image file to pixels: the one decoder, of training and of batch inference.

An image is turned as its EXIF orientation says, its transparent pixels are laid over white, 16-bit levels are scaled to
8 bits, the first frame of an animation is taken, and the result is made grey or coloured as the shape wants it. ICC
profiles are not applied. docs/data.md has a table of what each kind of file gives.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.data.config import MAX_PIXELS

Resize = Literal["crop", "pad", "stretch"]
# EPS is not among them: Pillow would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_SCANS = 100
"""Of a JPEG: each decodes all pixels again, in a few bytes. Progressive images have about ten."""
MAX_READS = 4_000_000
"""Of a file: Pillow reads comments a byte at a time, and headers in small pieces, of which a file may have millions."""
BACKGROUND = 255
"""Level of all channels behind transparent pixels and beside a padded image."""
_STRIP_PIXELS = 1 << 22
"""Pixels that are converted at a time, which takes up to 30 bytes for each."""
_SIGNED = 2
"""The TIFF tag SampleFormat of integers with a sign; Pillow reads those of 8 bits as if they had none."""
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_COLOR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used. The message says why and reads on from the image's name: "is of mode F ..."."""


@dataclass(frozen=True)
class Header:
    """What is known of an image without its pixels.

    Attributes:
        width, height: size in pixels as the image is shown, after its EXIF orientation.
        is_grey: whether the file has one level a pixel; a palette counts as colour.
    """

    width: int
    height: int
    is_grey: bool


def most_bytes(max_pixels: int) -> int:
    """Bytes that an image file may have: those of the largest image without compression, and room for other things."""
    return 4 * max(max_pixels, MAX_PIXELS)


def read_header(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Header:
    """Reads no more of an image than its header.

    Raises:
        ImageError: if it is of no known format, of too many pixels, or of a mode that is not decoded.
    """
    with _opened(file, max_pixels) as image:
        width, height = image.size
        # Pillow turns a TIFF by itself.
        if image.format != "TIFF" and _orientation(image) >= 5:
            width, height = height, width
        return Header(width, height, image.mode in _GREY_MODES)


def decode(data: bytes, image_shape: Sequence[int], resize: Resize | None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image as uint8 (H, W, C), in colour or grey as the shape wants it.

    Args:
        data: the image file.
        image_shape: height, width and channels (1 or 3) of the result.
        resize: how an image of another size is fitted; None refuses it.
        max_pixels: an image with more is refused before it is decoded.

    Raises:
        ImageError: if it cannot be decoded, or is of another size and `resize` is None.
    """
    if len(data) > (most := most_bytes(max_pixels)):
        raise ImageError(f"has more than the {most:,} bytes that are read")
    with _opened(io.BytesIO(data), max_pixels) as image:
        if image.format in ("JPEG", "MPO") and _has_many_scans(data):
            raise ImageError(f"is a JPEG of more than {MAX_SCANS} scans, which take long to decode: save it again")
        _scale_transparency(image)
        image.load()
        turn = None if image.format == "TIFF" else _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        return _fit(_convert(image, upright, "L" if image_shape[2] == 1 else "RGB"), image_shape, resize)


def fit_array(
    pixels: np.ndarray, image_shape: Sequence[int], resize: Resize | None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """`decode` for an image that is uint8 (H, W), (H, W, 1) or (H, W, 3) already.

    Raises:
        ImageError: as `decode`, or if the array is no such image.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ImageError(f"is {pixels.dtype} {pixels.shape}, not uint8 (H, W), (H, W, 1) or (H, W, 3)")
    if not pixels.size:
        raise ImageError(f"has no pixels: its shape is {pixels.shape}")
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise ImageError(_TOO_MANY.format(max_pixels))
    return _fit(Image.fromarray(pixels).convert("L" if image_shape[2] == 1 else "RGB"), image_shape, resize)


_TOO_MANY = "has more than the {:,} pixels that are decoded: make it smaller, or give --max-pixels (--data.max-pixels)"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


def _has_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more than `MAX_SCANS`; segments, and what follows the end of the image, are passed over."""
    position, scans = 2, 0
    while scans <= MAX_SCANS and (found := _MARKER.search(data, position)):
        if found.group() == _END_OF_IMAGE:
            return False
        scans += found.group() == _START_OF_SCAN
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return scans > MAX_SCANS


class _Counted:
    """A file that may be read in no more than `MAX_READS` pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_READS

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ImageError("has a header of millions of pieces: save it again")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    logging.getLogger("PIL.TiffImagePlugin").disabled = True  # it prints lines that name no file, and then raises
    try:
        with warnings.catch_warnings():
            # What a file has besides its pixels may be malformed; and the number of pixels is checked here.
            warnings.simplefilter("ignore")
            with Image.open(cast(BinaryIO, _Counted(file)), formats=FORMATS) as image:
                if _largest_area(image) > max_pixels:
                    raise Image.DecompressionBombError
                if image.format == "WEBP" and image.width * image.height > (most := max_pixels * 3 // 4):
                    raise ImageError(f"is a WebP, which takes more memory than others, and {_TOO_MANY.format(most)}")
                _check_mode(image)
                yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("is of no known image format") from None
    except Image.DecompressionBombError:
        raise ImageError(_TOO_MANY.format(max_pixels)) from None
    except Exception as error:  # Pillow's decoders raise what they like, struct.error and SyntaxError among others
        raise ImageError(f"cannot be decoded: {error}") from error


def _largest_area(image: Image.Image) -> int:
    """Pixels of the image, or of a tile of a TIFF, which is set aside whole and may be larger."""
    tile = _tiff_tag(image, ExifTags.Base.TileWidth, 0) * _tiff_tag(image, ExifTags.Base.TileLength, 0)
    return max(image.width * image.height, tile)


def _check_mode(image: Image.Image) -> None:
    """Refuses pixels whose range of values is not defined, or that Pillow cannot convert."""
    mode, inverted = image.mode, _tiff_tag(image, ExifTags.Base.PhotometricInterpretation, 1) == 0
    known = mode in _GREY_MODES or mode in _COLOR_MODES
    if not known or (mode == "I" and image.format != "PPM") or (mode.startswith("I") and inverted):
        raise ImageError(
            f"is a {image.format} of mode {mode}{', white as zero' if inverted else ''}, for which no range of levels "
            "is defined: convert it to 8 or 16 bits"
        )
    if _tiff_tag(image, ExifTags.Base.SampleFormat, 1) == _SIGNED:
        raise ImageError("is a TIFF of signed levels, for which no range is defined: convert it to 8 or 16 bits")


def _tiff_tag(image: Any, tag: int, default: int) -> int:
    value = image.tag_v2.get(tag, default) if image.format == "TIFF" else default
    return int(value[0] if isinstance(value, tuple) else value)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF of an image that is whole
        return 1
    return found if found in range(1, 9) else 1


def _convert(file: Image.Image, image: Image.Image, mode: str) -> Image.Image:
    """`image`, which was opened as `file`, in grey or colour of 8 bits, without transparency."""
    width, height = image.size
    lines = max(1, _STRIP_PIXELS // width)
    if lines >= height:
        return _convert_strip(file, image, mode)
    converted = Image.new(mode, image.size)
    for top in range(0, height, lines):
        box = (0, top, width, min(top + lines, height))
        converted.paste(_convert_strip(file, image.crop(box), mode), box)
    return converted


def _convert_strip(file: Image.Image, image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        peak = (1 << _tiff_tag(file, ExifTags.Base.BitsPerSample, 16)) - 1
        levels = np.asarray(image).astype(np.int64)
        scaled = (levels * 510 + peak) // (2 * peak)  # rounded; a conversion by Pillow would clip
        clear = levels == file.info.get("transparency")
        image = Image.fromarray(np.where(clear, BACKGROUND, scaled).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 4), image)
    return image.convert(mode)


def _scale_transparency(image: Any) -> None:
    """Brings the transparent level of a PNG, which counts in the bits of the file, to the bits that Pillow reads."""
    if image.format != "PNG" or not image.tile:
        return
    stored, clear = image.tile[0].args, image.info.get("transparency")  # the mode as the file has it
    if stored in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * 255 // ((1 << int(stored[2:])) - 1)
    elif stored == "RGB;16B" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in clear)


def _fit(image: Image.Image, image_shape: Sequence[int], resize: Resize | None) -> np.ndarray:
    height, width, channels = image_shape
    size = (width, height)
    if image.size != size:
        # Pillow's bilinear filter is antialiased: it widens with the scale.
        if resize is None:
            found = "{} x {}".format(*image.size)
            raise ImageError(f"is of {found} pixels, the model takes {width} x {height}: give --resize")
        if resize == "stretch":
            image = image.resize(size, Image.Resampling.BILINEAR)
        elif resize == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        else:
            # `ImageOps.pad` rounds the short side of a long image down to 0 pixels, and gives an empty image.
            if round(image.height / image.width * width) == 0:
                image = image.resize((width, 1), Image.Resampling.BILINEAR)
            elif round(image.width / image.height * height) == 0:
                image = image.resize((1, height), Image.Resampling.BILINEAR)
            ground = (BACKGROUND,) * channels if channels > 1 else BACKGROUND
            image = ImageOps.pad(image, size, Image.Resampling.BILINEAR, color=ground)
    return np.asarray(image).reshape(height, width, channels)
