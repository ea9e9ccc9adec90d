"""What a person is told when no cluster can be started, and what a cluster on this machine gets."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.workflow import cluster
from pipeline.workflow.cluster import join_or_start

ROOT = Path(__file__).parents[2]


def test_a_cluster_that_cannot_be_started_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = """
        import os, sys
        from pipeline.workflow.cluster import join_or_start
        for folder in sys.argv[1:]:
            os.environ["RAY_TMPDIR"] = folder
            try:
                join_or_start()
            except ValueError as error:
                print(error)
    """
    folders = [f"/tmp/{'x' * 100}", str(tmp_path / "file")]
    code = "\n".join(line[8:] for line in code.splitlines())
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, *folders], cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ
    )
    long, file = result.stdout.strip().splitlines()
    prefix = "Ray cannot be started on this machine: "
    assert long.startswith(prefix)
    assert "AF_UNIX path length cannot exceed 107 bytes" in long
    assert long.endswith("set RAY_TMPDIR to a folder with a short path, such as /tmp")
    assert file.startswith(prefix)
    assert file.endswith("set RAY_TMPDIR to a folder that this user may write, and HOME to one of this user")
    assert time.monotonic() - start < 30


@pytest.mark.usefixtures("not_connected")
def test_a_temporary_folder_without_room_is_said_at_once(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(small_disk / "ray"))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"temporary folder {small_disk}/ray has no room for 8,388,608 bytes: make room"
    ):
        join_or_start()
    assert time.monotonic() - start < 5, "Ray waits for half a minute"


def test_a_shared_memory_and_a_home_that_cannot_be_written_are_done_without(ray_folder: Path) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/dev/shm"]).returncode:
        pytest.skip("nothing can be mounted here")
    code = """if True:
        import numpy as np, os, ray
        from pipeline.workflow.cluster import join_or_start

        join_or_start()
        print(ray.get(ray.put(np.ones(2_000_000))).sum(), len(os.environ["RAY_AUTH_TOKEN"]))
    """
    places = "for place in /dev/shm /mnt; do mount -t tmpfs -o ro tmpfs $place || exit 99; done"
    script = f"{places}; exec {sys.executable} -c '{code}'"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_TMPDIR": str(ray_folder), "RAY_ADDRESS": "local", "HOME": "/mnt"}
    result = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (result.returncode, result.stdout) == (0, "2000000.0 64\n"), result.stderr


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_has_the_cpus_of_its_limit(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cluster, "CGROUP", tmp_path)
    assert cluster.usable_cpus() == (expected or len(os.sched_getaffinity(0)))


@pytest.mark.usefixtures("not_connected")
@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("PYTHONWARNINGS", "error", True),
        ("PYTHONWARNINGS", "ignore,error::UserWarning", True),
        ("PYTHONWARNINGS", "default", False),
        ("PYTHONOPTIMIZE", "2", True),
        ("PYTHONOPTIMIZE", "1", False),
    ],
)
def test_variables_of_python_with_which_ray_does_not_start(
    name: str, value: str, is_refused: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_TMPDIR", str(small_disk))  # what would be said next
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} = {value}: .* unset it" if is_refused else "has no room"):
        join_or_start()


def test_a_full_home_gets_a_token_elsewhere(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster._give_token()
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray writes it there"
    with contextlib.suppress(OSError):
        (small_disk / "all").write_bytes(bytes(4 << 20))
    monkeypatch.setenv("HOME", str(small_disk))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    cluster._give_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize(
    "said",
    ["The current node timed out during startup.", "Timed out waiting for file /tmp/ray/session_1/gcs_server_port_2"],
)
def test_a_start_that_takes_too_long_has_a_remedy(said: str) -> None:
    assert cluster._remedy(RuntimeError(said)).startswith(
        "this machine is too busy, or one of Ray's processes has ended"
    )
