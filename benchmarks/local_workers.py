"""TensorFlow workers on this machine: their addresses, and the environment variable that describes their cluster."""

import json
import os
import socket
from contextlib import ExitStack


def free_addresses(count: int) -> list[str]:
    """Loopback addresses `host:port` with ports that are free at the moment."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]


def join_cluster(addresses: list[str], rank: int) -> None:
    """Sets TF_CONFIG, by which MultiWorkerMirroredStrategy finds the workers and this worker's rank."""
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
