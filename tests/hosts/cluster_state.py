"""Starts the cluster on the hosts and observes it: its nodes, workers and epochs, and the files in storage."""

import contextlib
import json
import re
import socket
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from host_commands import wait_until
from hosts import Hosts

WORKER = r"^ray::.*RayTrainWorker"


@contextlib.contextmanager
def cluster_up(num_workers: int) -> Iterator[Hosts]:
    """A head and workers on which the cluster is up; prints the seconds that were measured at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder,
        Hosts(Path(folder), num_workers) as made,
    ):
        made.ray("up", "--yes", str(made.yaml))
        made.seconds["all nodes"] = wait_until(lambda: num_nodes(made) == num_workers + 1, 1200, "all nodes", pause=1)
        try:
            yield made
        finally:
            print(json.dumps({name: round(seconds, 1) for name, seconds in made.seconds.items()}))


def num_nodes(hosts: Hosts) -> int:
    """Number of nodes that the head considers alive."""
    status = hosts.ssh(hosts.head, "timeout 20 ray status").text  # it may hang when a node has just been lost
    active = re.search(r"Active:\s+(\d+) local", status)
    return int(active[1]) if active else 0


def is_open(port: int, address: str = "127.0.0.1") -> bool:
    """Whether this machine can connect to a port."""
    with socket.socket() as probe:
        probe.settimeout(3)
        return probe.connect_ex((address, port)) == 0


def open_to_strangers(hosts: Hosts) -> list[list[bool]]:
    """For each host with a training worker, whether this machine, which is none of them, can connect to its ports."""
    found = []
    for host in (hosts.head, *hosts.workers):
        lines = hosts.ssh(host, "ss -Hltnp").text.splitlines()
        ports = {int(line.split()[3].rpartition(":")[2]) for line in lines if "RayTrainWo" in line}
        if ports:
            found.append(sorted(is_open(port, host.address) for port in ports))
    return found


def manifest(hosts: Hosts, task: str, runs: str = "runs") -> dict:
    (path,) = (hosts.shared / runs / "tasks" / task).glob("*/manifest.json")
    return json.loads(path.read_text())


def most_attempts(hosts: Hosts, runs: str) -> int:
    """The largest number of attempts at one task that are in storage."""
    return max(len(list(task.glob("attempt-*"))) for task in (hosts.shared / runs / "tasks").glob("*/*"))


def trains_on(hosts: Hosts) -> set[str]:
    """Names of the hosts on which workers train now."""
    return {host.name for host in (hosts.head, *hosts.workers) if host.processes(WORKER)}


def epochs_of(text: str) -> list[int]:
    """The epochs that a driver has printed."""
    return [int(epoch) for epoch in re.findall(r"train +epoch (\d+)/\d+: loss", text)]


def epochs_in(hosts: Hosts, seconds: float) -> int:
    """Number of epochs that take `seconds` on this machine, estimated from the first run."""
    history = manifest(hosts, "train")["output"]["history"]
    return max(150, round(seconds / statistics.median(epoch["seconds"] for epoch in history)))
