"""Pickles and tars that are made to harm: no array but of its own bytes, and no header without an end."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from test_hostile_files import tar_header

from pipeline.data.archives import read_pickles
from pipeline.data.labelled_images import list_images

# Pickles of the names that are allowed, which NumPy's own classes would turn into pointers or gigabytes.
NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(" + NDARRAY + b"(J\0\0\0\0tU\1btR"
UINT8 = DTYPE + b"(U\2u1J\0\0\0\0J\1\0\0\0tR"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NDARRAY + b"((J\1\0\0\0tU\1OU\x08AAAAAAAAtR", "in another way than NumPy does"),
        (NDARRAY + b"((\x8a\5\0\0\0\xc0\0tU\2u1tR", "in another way than NumPy does"),
        (DTYPE + b"(U\1OJ\0\0\0\0J\1\0\0\0tR", "is of type b'O'"),
        (RECONSTRUCT + b"(J\1\0\0\0(J\x09\0\0\0t" + UINT8 + b"\x89U\x08AAAAAAAAtb", "has not the bytes"),
        (RECONSTRUCT + b"(J\1\0\0\0(J\xff\xff\xff\xffJ\xf8\xff\xff\xfft" + UINT8 + b"\x89U\x08AAAAAAAAtb", "has not"),
        (RECONSTRUCT + b"(J\1\0\0\0(J\x08\0\0\0t" + UINT8 + b"\x89N" + b"tb", "has not the bytes"),
        (b"Nr\0\0\0\x10", "remembers a value as number 268,435,456"),
        (b"T\0\0\0\x40x", "not loaded"),
        (b"(" * 10_000 + b"t" * 10_000, "expected a pickled dict, found tuple"),
    ],
)
def test_a_pickle_gets_no_array_but_of_its_own_bytes(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pickles(tar_gz(train=b"\x80\x02" + content + b"."), {"train"})


def tar_gz(**members: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


TARS = {
    "a link to nothing": tar_header(b"train", 0, b"1"),
    "nested long names": b"".join(tar_header(b"././@LongLink", 1, b"L") + b"x".ljust(512, b"\0") for _ in range(2000)),
    "a negative size": tar_header(b"train", -1024),
    "a long name": tar_header(b"././@LongLink", 1 << 20, b"L") + bytes(1 << 20),
    "holes": tar_header(b"train", 512, b"S") + bytes(512),
    "an endless name": tar_header(b"train", 1 << 33),
}


@pytest.mark.parametrize("name", TARS)
def test_headers_of_a_tar_are_bounded(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a whole \.tar\.gz|expected the members|expected at most") as caught:
        read_pickles(gzip.compress(TARS[name] + bytes(1024)), {"train"})
    assert len(str(caught.value)) < 1000
    (tmp_path / "a.tar").write_bytes(TARS[name] + bytes(1024))
    with pytest.raises(ValueError, match=r"a\.tar is no whole tar|has no images|train is a link to  and not a file"):
        list_images(str(tmp_path))
