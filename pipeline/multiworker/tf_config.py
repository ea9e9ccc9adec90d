"""TF_CONFIG, in which TensorFlow finds the addresses of the workers. Imports no TensorFlow."""

import json
import os
from typing import NamedTuple

TRAINING_JOBS = ("chief", "worker")
"""Jobs whose processes are workers of MultiWorkerMirroredStrategy, in the order of their ranks."""
_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


class Cluster(NamedTuple):
    """What TF_CONFIG says.

    Attributes:
        workers: Addresses `host:port` of the workers, in the order of their ranks.
        own: That of this process; None if it is no worker.
    """

    workers: tuple[str, ...]
    own: str | None


def cluster() -> Cluster:
    """Reads TF_CONFIG; no workers if it is not set.

    Raises:
        ValueError: if it is not of the form that TensorFlow wants.
    """
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(text)
        jobs, task = config.get("cluster", {}), config.get("task", {})
        found = {job: [str(address) for address in jobs[job]] for job in TRAINING_JOBS if job in jobs}
        kind, index = task.get("type"), int(task.get("index", 0))
        own = found[kind][index] if kind in found and index >= 0 else None
        workers = [address for of_job in found.values() for address in of_job]
        for address in workers:
            int(address.rpartition(":")[2])
            if workers.count(address) > 1:
                raise ValueError(f"two workers have the address {address}")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"TF_CONFIG is {text}, which is not of the form {_EXAMPLE}, with an index below the number of addresses "
            f"({type(error).__name__}: {error})"
        ) from None
    return Cluster(tuple(workers), own)
