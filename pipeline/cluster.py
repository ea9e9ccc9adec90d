"""Joins the Ray cluster that is there, or starts one on this machine, after making sure that the work fits into it."""

import math
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from pipeline.config import PipelineConfig
from tune.resources import concurrent_trials

ANSWER_SECONDS = 2.0


def connect(config: PipelineConfig) -> None:
    """Connects this process to Ray.

    Raises:
        ValueError: if the workers or the trials of `config` can never fit, or if nothing answers at `$RAY_ADDRESS`;
            names the numbers and the remedy.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if address_to_join() is None:
        check_resources(config, {"CPU": len(os.sched_getaffinity(0)), "GPU": None}, "this machine")
    join_or_start()
    check_resources(config, ray.cluster_resources(), "the cluster")


def join_or_start() -> None:
    """Joins the Ray cluster that is there, or starts one on this machine.

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
