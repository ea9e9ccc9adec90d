"""Joins or starts Ray after checking that the cluster has room for the workers and the trials."""

import math
import os
import time
from collections.abc import Callable, Mapping

import ray

from pipeline.command import libraries_to_log
from pipeline.devices import mention_unused_gpus, require_gpu_in_cluster
from pipeline.settings.config import PipelineConfig
from pipeline.storage import Storage
from pipeline.tracking.provenance import PACKAGES
from pipeline.workflow.address import address_to_join
from pipeline.workflow.cluster import join_or_start, usable_cpus
from pipeline.workflow.nodes import check_nodes
from tune.resources import concurrent_trials

# `ray up` returns when the head is up; the workers join later.
JOIN_SECONDS = 90.0


def connect(config: PipelineConfig, storage: Storage, say: Callable[[str], None] = lambda text: None) -> bool:
    """Connects this process to Ray.

    Args:
        config: Configuration whose workers and trials need room.
        storage: Storage that every node must see.
        say: Prints a line for a person who waits.

    Returns:
        Whether the cluster was there before, and so may outlive this process.

    Raises:
        ValueError: if the workers or the trials of `config` can never fit, if nothing answers at `$RAY_ADDRESS`, or if
            a node does not see `storage`; names the numbers or the node, and the remedy.
        GpuError: if TensorFlow cannot use the GPUs of the cluster, and `config` asks for them.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    check_machine(config)
    with libraries_to_log():
        joined = join_or_start()
    if joined:
        _wait_for_nodes(config, say)
        check_nodes(storage, PACKAGES, say)
    else:
        check_resources(config, ray.cluster_resources(), "the cluster")
    _check_gpus(config, say)
    return joined


def check_machine(config: PipelineConfig) -> None:
    """Compares what the tasks need with what this machine has, if Ray would be started on it; raises as `connect`."""
    if not ray.is_initialized() and address_to_join() is None:
        check_resources(config, {"CPU": usable_cpus(), "GPU": None}, "this machine")


def _check_gpus(config: PipelineConfig, say: Callable[[str], None]) -> None:
    """Tries one of the GPUs that `config` asks for; says so if it asks for none of those that are there."""
    if config.train.use_gpu:
        require_gpu_in_cluster("train.use_gpu")
    else:
        mention_unused_gpus("train.use_gpu", say)


def _wait_for_nodes(config: PipelineConfig, say: Callable[[str], None]) -> None:
    """Waits until the cluster has room for `config`; raises as `check_resources` after `JOIN_SECONDS`."""
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


def check_resources(config: PipelineConfig, available: Mapping[str, float | None], where: str) -> None:
    """Compares what the tasks need at once with what the cluster has.

    Args:
        config: Configuration whose workers and trials need room.
        available: Number of `CPU` and `GPU` of the whole cluster; None: not known yet.
        where: Name of the cluster in messages.

    Raises:
        ValueError: if there can never be room.
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
