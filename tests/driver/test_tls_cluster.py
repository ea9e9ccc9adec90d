"""A cluster of `ray start` whose nodes and drivers show one another certificates (RAY_USE_TLS)."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from certificates import self_signed
from ray_head import shell, start_head
from session_processes import kill_cluster

from pipeline.workflow.address import CERTIFICATES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_cluster_with_tls_runs_the_pipeline(ray_folder: Path, tmp_path: Path) -> None:
    host = ray.util.get_node_ip_address()
    certificate = self_signed(tmp_path, host, "127.0.0.1")
    variables = {name: str(certificate) for name in CERTIFICATES} | {"RAY_USE_TLS": "1", "no_proxy": host}
    environment = shell(tmp_path, RAY_TMPDIR=str(ray_folder), **variables)
    address, head = start_head(ray_folder, environment, host)
    try:
        command = ["pipeline/run.py", "quickstart", "--storage", str(tmp_path / "runs"), "--search.num-trials", "0"]
        result = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        kill_cluster(ray_folder)
        head.wait()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "registered" in result.stdout
