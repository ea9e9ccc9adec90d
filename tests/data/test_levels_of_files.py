"""Levels and sizes in which PNG, TIFF and JPEG files differ from what Pillow makes of them."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.image_decoding import ImageError, decode, read_header

RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (8, 8, 3), dtype=np.uint16)
Entry = tuple[int, int, int]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, color: int, rows: list[bytes], *chunks: bytes) -> bytes:
    """A PNG of 8 x 8 pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(pixels: bytes, *entries: Entry) -> bytes:
    """A TIFF of 8 x 8 pixels of 8 bits, with more tags of one long number each."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(pixels)}
    tags |= {tag: value for tag, _, value in entries}
    kinds = {tag: kind for tag, kind, _ in entries}
    body = b"".join(struct.pack("<HHII", tag, kinds.get(tag, 4), 1, tags[tag]) for tag in sorted(tags))
    return b"II" + struct.pack("<HI", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + body + bytes(4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("clear", [0, 1])
def test_the_transparent_level_of_a_grey_png_counts_in_its_own_bits(bits: int, clear: int) -> None:
    levels = (GREY >> (8 - bits)).astype(int)
    packed = np.unpackbits(levels.astype(np.uint8)[..., np.newaxis], axis=2)[..., 8 - bits :]
    rows = [np.packbits(row.reshape(-1)).tobytes() for row in packed]
    expected = np.where(levels == clear, 255, levels * 255 // ((1 << bits) - 1))
    found = decode(png(bits, 0, rows, chunk(b"tRNS", struct.pack(">H", clear))), (8, 8, 1), None)
    np.testing.assert_array_equal(found[..., 0], expected)


def test_the_transparent_color_of_16_bits() -> None:
    clear = tuple(map(int, DEEP[2, 3]))
    data = png(16, 2, [row.astype(">u2").tobytes() for row in DEEP], chunk(b"tRNS", struct.pack(">HHH", *clear)))
    expected = np.where((np.array(clear) == DEEP).all(axis=2, keepdims=True), 255, DEEP >> 8)
    np.testing.assert_array_equal(decode(data, (8, 8, 3), None), expected)


def test_signed_levels_are_refused() -> None:
    for read in (lambda data: decode(data, (8, 8, 1), None), lambda data: read_header(io.BytesIO(data))):
        read(tiff(GREY.tobytes()))
        with pytest.raises(ImageError, match="is a TIFF of signed levels"):
            read(tiff(GREY.tobytes(), (339, 3, 2)))


def test_a_tile_that_is_larger_than_any_image_is_refused() -> None:
    data = zlib.compress(bytes(1 << 20))
    for side, is_refused in ((1024, False), (20_000, True)):
        file = tiff(data, (259, 3, 8), (322, 4, side), (323, 4, side), (324, 4, 8), (325, 4, len(data)))
        if is_refused:
            with pytest.raises(ImageError, match="more than the 89,478,485 pixels"):
                decode(file, (8, 8, 1), None)
        else:
            assert not decode(file, (8, 8, 1), None).any()


def test_a_jpeg_of_a_hundred_thousand_scans_is_refused() -> None:
    data = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)).save(data, "JPEG", progressive=True)
    good = data.getvalue()
    last = good[good.rindex(b"\xff\xda") : -2]
    assert decode(good, (64, 64, 1), None).any()
    # A phone may add a film after the end of the image, in which these bytes mean nothing.
    np.testing.assert_array_equal(
        decode(good + b"\xff\xda\0\2" * 1000, (64, 64, 1), None), decode(good, (64, 64, 1), None)
    )
    began = time.process_time()
    with pytest.raises(ImageError, match="is a JPEG of more than 100 scans"):
        decode(good[:-2] + last * 100_000 + b"\xff\xd9", (64, 64, 1), None)
    assert time.process_time() - began < 2


def test_a_damaged_tiff_prints_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ImageError):
        read_header(io.BytesIO(tiff(GREY.tobytes(), (277, 3, 10_000))))
    assert caplog.records == []
    assert "".join(capfd.readouterr()) == ""


def test_a_header_that_is_read_in_millions_of_pieces_is_refused() -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "JPEG")
    good = data.getvalue()
    segments = good[:2] + b"\xff\xe2\x00\x04ab" * 2_000_000 + good[2:]
    for file in (b"P6 #" + b"x" * 20_000_000, segments):
        for read in (lambda file=file: decode(file, (8, 8, 3), None), lambda file=file: read_header(io.BytesIO(file))):
            began = time.monotonic()
            with pytest.raises(ImageError, match="has a header of millions of pieces"):
                read()
            assert time.monotonic() - began < 20
