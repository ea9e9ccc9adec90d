"""The address of the cluster to join."""

import socket
from pathlib import Path

import pytest

from pipeline.workflow.cluster import address_to_join


def test_what_a_killed_cluster_left_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert address_to_join() == address
    assert address_to_join() is None
