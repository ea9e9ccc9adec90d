"""A real `mlflow server` on this machine that can be killed and brought back on the same port."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class TrackingServer:
    """Starts a server with its own artifact store below `folder`.

    Args:
        store: URI of the backend store; an SQLite file below `folder` if not given.
        address: Address at which the server listens.
    """

    def __init__(self, folder: Path, store: str | None = None, address: str = "127.0.0.1") -> None:
        self.folder, self.store = folder, store or f"sqlite:///{folder}/server.db"
        self.address, self.port = address, free_port()
        self.uri = f"http://{address}:{self.port}"
        self.start()

    def start(self) -> None:
        """Starts the server and returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", self.address, "--port", str(self.port)]
        command += ["--allowed-hosts", f"{self.address}:{self.port}"]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", f"{self.folder}/files"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        log = self.folder / "server.log"
        with log.open("a") as stream:
            # In a new session, so that the workers of the server can be killed with their process group.
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        # The first request of the store takes longest.
        wait_until_healthy(f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1", self.process, log)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the server and its workers."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Ends the server and its workers as a crash would."""
        kill(self.process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill(process: subprocess.Popen) -> None:
    """Kills a process that was started in a new session, and its child processes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path, timeout: float = 600) -> None:
    """Waits until `url` answers. The imports of the server take 5 s, and much longer on a busy machine."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
