"""Observes the cluster on the hosts: its nodes, workers and epochs, and the files in storage."""

import json
import re
import socket
import statistics

from hosts import Hosts

WORKER = r"^ray::.*RayTrainWorker"


def num_nodes(hosts: Hosts) -> int:
    """Number of nodes that the head considers alive."""
    status = hosts.ssh(hosts.head, "timeout 20 ray status").text  # it may hang when a node has just been lost
    active = re.search(r"Active:\s+(\d+) local", status)
    return int(active[1]) if active else 0


def is_open(port: int) -> bool:
    """Whether a process listens on this port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
