"""A cluster of `ray start`, and the environment of a user of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tracking_server import free_port


def shell(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a user whose home is `home`, with no variable of Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KERAS_"))}
    return kept | {"HOME": str(home)} | variables


def start_head(ray_folder: Path, environment: dict[str, str], host: str) -> tuple[str, subprocess.Popen[bytes]]:
    """Starts a cluster with 2 CPUs by `ray start`; returns its address and the process that is to be waited for."""
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"]
    command += ["--port", str(port), "--node-ip-address", host, "--include-dashboard", "false"]
    command += ["--temp-dir", str(ray_folder / "ray")]
    with (ray_folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in (ray_folder / "head.log").read_text():
        assert head.poll() is None, (ray_folder / "head.log").read_text()
        assert time.monotonic() < deadline, (ray_folder / "head.log").read_text()
        time.sleep(0.1)
    return f"{host}:{port}", head
