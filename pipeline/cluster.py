"""Joins the Ray cluster that is there, or starts one on this machine, after making sure that the work fits into it.

On a cluster of several nodes it also makes sure that all of them see the same storage.
"""

import math
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import PipelineConfig
from pipeline.storage import Storage
from tune.resources import concurrent_trials

ANSWER_SECONDS = 2.0
# `ray up` returns when the head is up: the workers follow.
JOIN_SECONDS = 90.0
# For a process on every node, which reads one file.
STORAGE_SECONDS = 60.0


def connect(config: PipelineConfig, storage: Storage, say: Callable[[str], None] = lambda text: None) -> bool:
    """Connects this process to Ray.

    Args:
        say: is told what one waits for.

    Returns:
        Whether to a cluster that goes on without this process.

    Raises:
        ValueError: if the workers or the trials of `config` can never fit, if nothing answers at `$RAY_ADDRESS`, or if
            a node does not see `storage`; names the numbers or the node, and the remedy.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if address_to_join() is None:
        check_resources(config, {"CPU": len(os.sched_getaffinity(0)), "GPU": None}, "this machine")
    joined = join_or_start()
    if joined:
        _wait_for_nodes(config, say)
        check_storage(storage)
    else:
        check_resources(config, ray.cluster_resources(), "the cluster")
    return joined


def join_or_start() -> bool:
    """Joins the Ray cluster that is there, or starts one on this machine; returns whether it has joined one.

    Raises:
        ValueError: if nothing answers at `$RAY_ADDRESS`.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address := address_to_join():
        ray.init(address=address, **options)
    else:
        cpus = len(os.sched_getaffinity(0))
        # Not left to Ray: asked for any address, it would join whatever cluster another program runs on this machine.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    return address is not None


def address_to_join() -> str | None:
    """Address of the cluster to join: `$RAY_ADDRESS`, or what `ray start` left on this machine if it answers."""
    if address := os.environ.get("RAY_ADDRESS"):
        if re.fullmatch(r"[^/]+:[0-9]+", address) and not _answers(address):
            raise ValueError(f"RAY_ADDRESS = {address}: no cluster answers: start it, or unset RAY_ADDRESS")
        return address
    left = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    address = left.read_text().strip() if left.exists() else None
    return address if address and _answers(address) else None


def _answers(address: str) -> bool:
    """Whether a process listens at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def _wait_for_nodes(config: PipelineConfig, say: Callable[[str], None]) -> None:
    """Waits until the cluster has room for `config`; as `check_resources`, if it has none after `JOIN_SECONDS`."""
    deadline, told = time.monotonic() + JOIN_SECONDS, False
    while True:
        try:
            return check_resources(config, ray.cluster_resources(), "the cluster")
        except ValueError:
            if time.monotonic() > deadline:
                raise
        if not told:
            say(f"the cluster is too small yet: waiting up to {JOIN_SECONDS:g} s for more nodes")
            told = True
        time.sleep(1)


def check_storage(storage: Storage) -> None:
    """Lets every node of the cluster read what this process has just written.

    Raises:
        ValueError: if one cannot; names it. A node that does not answer in time is passed over, as one that leaves may.
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
    """Why this node does not read `word` in the file `probe`; None if it does."""
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


def check_resources(config: PipelineConfig, available: Mapping[str, float | None], where: str) -> None:
    """Compares what the tasks ask for at once with what there is in all; None is not known yet.

    Raises:
        ValueError: if it can never be enough.
    """
    train, cpus, workers = config.train, available.get("CPU", 0), config.train.min_workers
    if cpus is not None and workers * train.cpus_per_worker > cpus:
        raise ValueError(
            f"train.num_workers = {workers} with train.cpus_per_worker = {train.cpus_per_worker:g} take "
            f"{workers * train.cpus_per_worker:g} CPUs, but {where} has {cpus:g}: take fewer workers, or "
            f"less of a CPU for each (--train.cpus-per-worker {math.floor(1000 * cpus / workers) / 1000:g})"
        )
    gpus = available.get("GPU", 0)
    if train.use_gpu and gpus is not None and workers > gpus:
        raise ValueError(
            f"train.use_gpu = True with train.num_workers = {workers} takes as many GPUs, but {where} has "
            f"{gpus:g}: take fewer workers, or --train.no-use-gpu"
        )
    if config.search.num_trials and cpus is not None:
        concurrent_trials(
            cpus,
            math.inf if gpus is None else gpus,
            workers=config.search.workers_per_trial,
            cpus_per_worker=config.search.cpus_per_trial,
            gpus_per_worker=float(train.use_gpu),
            where=where,
        )
