"""A cluster of `ray start` that wants the token of its user, and commands given in a shell that sets nothing of Ray."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_models import IMAGE_SHAPE, save_model
from PIL import Image
from ray_head import shell, start_head
from session_processes import kill_cluster

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user for whom Ray has made a token, as the first local run does."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(TOKEN)
    return folder


@pytest.fixture(scope="module")
def cluster(home: Path, ray_folder: Path) -> Iterator[str]:
    """Address of a cluster with 2 CPUs."""
    address, head = start_head(ray_folder, shell(home, RAY_TMPDIR=str(ray_folder)), "127.0.0.1")
    yield address
    kill_cluster(ray_folder)
    head.wait()


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_pipeline_joins_it(cluster: str, home: Path, ray_folder: Path, tmp_path: Path) -> None:
    command = ["pipeline/run.py", "quickstart", "--storage", str(tmp_path / "runs"), "--until", "ingest"]
    result = run(shell(home, RAY_TMPDIR=str(ray_folder)), *command)
    assert result.returncode == 0, result.stdout + result.stderr
    (session,) = {path.resolve() for path in (ray_folder / "ray").glob("session_*")}
    assert session.is_dir(), "no cluster of its own was started"


@pytest.mark.slow  # loads TensorFlow twice
def test_batch_inference_joins_it(cluster: str, home: Path, ray_folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.new("RGB", IMAGE_SHAPE[1::-1]).save(tmp_path / "images" / "a.png")
    command = ["-m", "pipeline.predict", str(tmp_path / "model"), str(tmp_path / "images"), str(tmp_path / "out")]
    result = run(shell(home, RAY_ADDRESS=cluster, RAY_TMPDIR=str(ray_folder)), *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 images done, 0 of them could not be read" in result.stdout


@pytest.mark.parametrize("token", [None, "f" * 32], ids=["none", "a wrong one"])
def test_without_its_token_the_remedy_is_said(token: str | None, cluster: str, tmp_path: Path) -> None:
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    command = ["pipeline/run.py", "quickstart", "--storage", str(tmp_path / "runs"), "--until", "ingest"]
    start = time.monotonic()
    result = run(shell(tmp_path, RAY_ADDRESS=cluster), *command)
    assert result.returncode == 2
    log, message = result.stderr.splitlines()
    assert "InvalidAuthToken" in Path(log.removeprefix("what the libraries said: ")).read_text()
    assert message.startswith(f"error: the cluster at {cluster} cannot be joined")
    assert "give this user the cluster's token, in ~/.ray/auth_token or RAY_AUTH_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - start < 45, "Ray alone tries for 20 s after the start of the command"


def test_a_cluster_of_another_version_is_named(cluster: str, home: Path) -> None:
    code = """
        import ray
        from pipeline.workflow.cluster import join_or_start
        ray.__version__ = "2.0.0"
        try:
            join_or_start()
        except ValueError as error:
            print(error)
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    result = run(shell(home, RAY_ADDRESS=cluster, RAY_AUTH_MODE="token"), "-c", code)
    assert result.stdout.startswith(f"the cluster at {cluster} cannot be joined: Version mismatch"), result.stderr
    assert result.stdout.strip().endswith("install the same versions of Ray and Python as the cluster has")
