"""Images of one's own in an object store: a real S3-compatible server on this machine, SeaweedFS."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from own_images import KINDS
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server

from pipeline.data.config import DatasetConfig
from pipeline.data.image_files import list_parts, read_part
from pipeline.data.image_rows import load_files
from pipeline.data.image_survey import find_images
from pipeline.data.ingest import ingest
from pipeline.data.rows import rows_digest
from pipeline.storage import Storage


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of the bucket with the keys in it, since Ray's processes may be older than this test."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server.uri.replace("s3://", f"s3://{ACCESS_KEY}:{SECRET_KEY}@")


def inside(bucket: str, path: str) -> str:
    return bucket.replace("?", f"/{path}?")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_of_the_folder(kind: str, bucket: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "images")
    Storage(inside(bucket, kind)).upload(tmp_path / "images", "")
    local, remote = (
        find_images(DatasetConfig("files", path=path), str(tmp_path / "runs"))
        for path in (str(tmp_path / "images"), inside(bucket, kind))
    )
    expected, found = load_files(local), load_files(remote)
    assert rows_digest(found.train) == rows_digest(expected.train)
    assert rows_digest(found.test) == rows_digest(expected.test)
    storage = Storage(str(tmp_path / "runs"))
    files, expected_files = (ingest(config, storage, f"{config is local}")["files"] for config in (remote, local))
    for split in expected_files:
        assert [file["sha256"] for file in files[split]] == [file["sha256"] for file in expected_files[split]]


def test_large_files_headers_errors_and_batch_inference(bucket: str, tmp_path: Path) -> None:
    import numpy as np
    from own_images import png

    root = Storage(inside(bucket, "large"))
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(3):
            root.write_bytes(f"{name}/{number}.png", png(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)))
    config = DatasetConfig("files", path=inside(bucket, "large"), test_fraction=0.3)
    assert len(load_files(find_images(config, str(tmp_path))).train) == 4
    parts = list_parts(inside(bucket, "large"), 10)
    table = read_part(parts.parts[0], parts.kind, parts.root, (20, 20, 3), "crop")
    assert table["name"].to_pylist()[:2] == ["cat/0.png", "cat/1.png"]
    assert table["error"].null_count == 6
    root.write_bytes("cat/0.png", b"not " * 30_000)
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be used, first cat/0\.png, which is of no known"):
        find_images(config, str(tmp_path))
    with pytest.raises(ValueError, match="no such file or folder"):
        find_images(DatasetConfig("files", path=inside(bucket, "nothing")), str(tmp_path))
    wrong = inside(bucket, "large").replace(SECRET_KEY, "wrong")
    with pytest.raises(ValueError, match=r"data\.path = .* cannot be read"):
        find_images(DatasetConfig("files", path=wrong), str(tmp_path))
