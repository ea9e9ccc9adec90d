"""What other users can put into folders that all may write to, or into storage, is not believed."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from pipeline.storage import Storage
from pipeline.workflow import cluster
from pipeline.workflow.address import address_to_join
from pipeline.workflow.lease import Lease

NOBODY = 65534


@pytest.fixture
def address() -> Iterator[str]:
    """Address of a gRPC server, which is all that is asked of a cluster before it is joined."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> Path:
    """The file in which `ray start` leaves the address of its cluster."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir(mode=0o777)
    path = tmp_path / "ray" / "ray_current_cluster"
    path.write_text(f"{address}\n")
    return path


def test_a_cluster_of_ones_own_is_joined(current: Path, address: str) -> None:
    assert address_to_join() == address


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_cluster_that_another_user_has_named_is_not_joined(current: Path) -> None:
    os.chown(current, NOBODY, NOBODY)
    assert address_to_join() is None


def test_links_and_pipes_are_not_followed(current: Path, tmp_path: Path) -> None:
    current.rename(tmp_path / "elsewhere")
    current.symlink_to(tmp_path / "elsewhere")
    assert address_to_join() is None
    current.unlink()
    os.mkfifo(current)
    assert address_to_join() is None


def test_the_token_is_hidden_from_other_users(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    cluster._hide_token(token)
    token.write_text("0" * 64)
    token.chmod(0o644)
    cluster._hide_token(token)
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"{", b'{"host": [], "machine": "", "pid": "../1", "born": 0}'])
def test_a_claim_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("drivers/key/planted.json", content)
    with (
        pytest.raises(ValueError, match=r"drivers/key/planted\.json: .*: delete the file"),
        Lease(storage, ["key"], lambda key, claim: None),
    ):
        pass
