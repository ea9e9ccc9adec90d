"""Joins the Ray cluster that is running or starts one on this machine; checks that all nodes see the same storage."""

import os
import re
import socket
import tempfile
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.storage import Storage

ANSWER_SECONDS = 2.0
# Time for one process on every node to start and to read one file.
STORAGE_SECONDS = 60.0


def join_or_start() -> bool:
    """Joins the Ray cluster that is running, or starts one on this machine; returns whether it has joined one.

    Raises:
        ValueError: if nothing answers at `$RAY_ADDRESS`.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address := address_to_join():
        ray.init(address=address, **options)
    else:
        cpus = len(os.sched_getaffinity(0))
        # Without an address Ray would join any cluster that another program runs on this machine.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    return address is not None


def address_to_join() -> str | None:
    """Address of the cluster to join: `$RAY_ADDRESS`, or that of a `ray start` on this machine if it answers.

    Raises:
        ValueError: if nothing answers at `$RAY_ADDRESS`.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        if re.fullmatch(r"[^/]+:[0-9]+", address) and not _answers(address):
            raise ValueError(f"RAY_ADDRESS = {address}: no cluster answers: start it, or unset RAY_ADDRESS")
        return address
    left = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    address = left.read_text().strip() if left.exists() else None
    return address if address and _answers(address) else None


def _answers(address: str) -> bool:
    """Whether a process listens at `host:port`; Ray itself would keep trying for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def check_storage(storage: Storage) -> None:
    """Checks that every node of the cluster can read what this process has just written.

    A node that does not answer in time is skipped, since it may be leaving.

    Raises:
        ValueError: if a node cannot read it; names the node.
    """
    probe, word = f"probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    storage.write_bytes(probe, word.encode())
    try:
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        on = {
            _why_unseen.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                storage, probe, word
            ): address
            for node, address in nodes.items()
        }
        answered, _ = ray.wait(list(on), num_returns=len(on), timeout=STORAGE_SECONDS)
        for answer in answered:
            try:
                why = ray.get(answer)
            except ray.exceptions.RayError as error:
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise
                continue  # the node has gone meanwhile
            if why:
                raise ValueError(f"storage = {storage.uri!r}: node {on[answer]} {why}")
    finally:
        storage.delete(probe)


@ray.remote(num_cpus=0, max_retries=0)
def _why_unseen(storage: Storage, probe: str, word: str) -> str | None:
    """Why this node cannot read `word` from the file `probe`; None if it can."""
    try:
        if storage.read_bytes(probe).decode() == word:
            return None
    except FileNotFoundError:
        if storage.is_local:
            return (
                "sees another folder under this path than the driver: mount the same folder on all nodes, or give an "
                "object store"
            )
    except OSError as error:
        return f"cannot read there: {error}"
    return "does not see what the driver writes there: give all nodes the same store"
