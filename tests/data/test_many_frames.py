"""Animations and pages without end, and claims of large canvases: the first frame, soon, in little memory."""

import io
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.config import MAX_PIXELS
from pipeline.data.image_decoding import ImageError, decode, read_header

ROOT = Path(__file__).parents[2]


def with_frames(kind: str, count: int, **options: object) -> bytes:
    """An image of 8 x 8 whose first frame is all 1."""
    frames = [Image.fromarray(np.full((8, 8, 3), 1 + number % 200, np.uint8)) for number in range(count)]
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], **options)
    return data.getvalue()


def pages(count: int, last: int = 0) -> bytes:
    """A TIFF of grey pages that share their pixels; the last one points to `last` as the next."""
    tags = ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1), (278, 8), (279, 64))
    size = 2 + 12 * len(tags) + 4
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(count):
        data += struct.pack("<H", len(tags))
        for tag, value in tags:
            data += struct.pack("<HHII", tag, 4, 1, 8 + size * count if tag == 273 else value)
        data += struct.pack("<I", last if number + 1 == count else 8 + size * (number + 1))
    return bytes(data) + b"\1" * 64


def claimed_webp(side: int, frames: int) -> bytes:
    """A WebP that claims a canvas of side x side pixels, and frames of 8 x 8."""
    still = io.BytesIO()
    Image.new("RGB", (8, 8)).save(still, "WEBP", lossless=True)
    stream = still.getvalue()[12:]  # with the header of its chunk

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def u24(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    frame = chunk(b"ANMF", u24(0) * 2 + u24(7) * 2 + u24(100) + b"\0" + stream)
    extended = chunk(b"VP8X", b"\x12\0\0\0" + u24(side - 1) * 2)
    body = b"WEBP" + extended + chunk(b"ANIM", b"\xff\xff\xff\xff\0\0") + frame * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def claimed_apng() -> bytes:
    """An animated PNG of three frames that claims as many as its field can."""
    data = bytearray(with_frames("PNG", 3))
    place = data.index(b"acTL")
    data[place + 4 : place + 8] = b"\x7f\xff\xff\xff"
    data[place + 12 : place + 16] = struct.pack(">I", zlib.crc32(data[place : place + 12]))
    return bytes(data)


MADE = {
    "GIF": lambda: with_frames("GIF", 2)[:-1] + with_frames("GIF", 2)[-40:-1] * 200_000 + b";",
    "APNG": lambda: with_frames("PNG", 500),
    "APNG that claims 2**31 - 1 frames": lambda: claimed_apng(),
    "WebP": lambda: with_frames("WEBP", 500, lossless=True),
    "TIFF": lambda: pages(100_000),
    "TIFF whose pages form a loop": lambda: pages(2, last=8),
}


@pytest.mark.parametrize("name", MADE)
def test_the_first_of_many_frames_is_taken(name: str) -> None:
    data = MADE[name]()
    start = time.process_time()
    header = read_header(io.BytesIO(data))
    image = decode(data, (8, 8, 3), None)
    assert time.process_time() - start < 1
    assert (header.width, header.height) == (8, 8)
    np.testing.assert_array_equal(image, np.ones((8, 8, 3), np.uint8))


@pytest.mark.parametrize("side", [9000, 16383, 2**24])
def test_a_webp_of_a_large_canvas_is_refused_by_its_header(side: int) -> None:
    data = claimed_webp(side, 2)
    assert len(data) < 200
    for read in (lambda: read_header(io.BytesIO(data)), lambda: decode(data, (8, 8, 3), "crop")):
        with pytest.raises(ImageError, match=r"has more than the \d\d,\d\d\d,\d\d\d pixels that are decoded"):
            read()
    if side == 9000:
        assert decode(data, (8, 8, 3), "crop", max_pixels=200_000_000).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["still", "animated"])
def test_the_largest_webp_stays_within_the_memory_of_a_reader(kind: str, tmp_path: Path) -> None:
    side = int((MAX_PIXELS * 3 // 4) ** 0.5)
    data = claimed_webp(side, 50)
    if kind == "still":
        made = io.BytesIO()
        Image.new("RGB", (side, side)).save(made, "WEBP", lossless=True, quality=0, method=0)
        data = made.getvalue()
    (tmp_path / "x.webp").write_bytes(data)
    code = """if True:
        import sys
        from pathlib import Path
        from pipeline.data.image_decoding import decode

        def most():  # MiB
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

        before = most()
        decode(Path(sys.argv[1]).read_bytes(), (8, 8, 3), "crop")
        print(most() - before)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "x.webp")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert 500 < float(result.stdout) < 1100
