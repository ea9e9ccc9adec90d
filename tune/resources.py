"""How many trials fit on a cluster at the same time."""

import math


def concurrent_trials(
    cpus: float,
    gpus: float,
    *,
    workers: int = 1,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    limit: int = 0,
    where: str = "the cluster",
) -> int:
    """Number of trials that run at the same time on a cluster.

    Args:
        cpus: CPUs of the whole cluster.
        gpus: GPUs of the whole cluster.
        workers: number of workers of a trial.
        cpus_per_worker: CPUs of each worker, may be a fraction.
        gpus_per_worker: GPUs of each worker.
        limit: most trials at the same time; 0 for no limit.
        where: name of the cluster in the error message.

    Returns:
        At least 1.

    Raises:
        ValueError: if not even one trial fits; Ray would wait forever for its resources.
    """
    fit: list[float] = []
    for name, available, each in (("CPU", cpus, cpus_per_worker), ("GPU", gpus, gpus_per_worker)):
        if each <= 0:
            continue
        # Sums of tenths are inexact in floating point: 2.9999999999 trials are 3.
        fit.append(available / (workers * each) + 1e-6)
        if fit[-1] < 1:
            per_worker = math.floor(1000 * available / workers) / 1000
            setting = "search.cpus_per_trial" if name == "CPU" else "train.use_gpu"
            remedy = f"--search.cpus-per-trial {per_worker:g}" if name == "CPU" else "--train.no-use-gpu"
            raise ValueError(
                f"search.workers_per_trial = {workers} with {setting} = {each:g} take {workers * each:g} {name}s, but "
                f"{where} has {available:g} {name}s: take fewer workers, or {remedy}"
            )
    return math.floor(min([*fit, limit or math.inf]))
