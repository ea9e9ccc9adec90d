"""How many trials a cluster has room for at once."""

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
    """Trials that run at the same time on a cluster with `cpus` and `gpus` in all.

    Args:
        workers: of a trial.
        cpus_per_worker: CPUs of each, may be a fraction.
        gpus_per_worker: GPUs of each.
        limit: most trials at once; 0 for no limit.
        where: what has the CPUs and GPUs, for the message.

    Returns:
        At least 1.

    Raises:
        ValueError: if there is not room for a single trial, which would wait for ever.
    """
    fit: list[float] = []
    for name, there, each in (("CPU", cpus, cpus_per_worker), ("GPU", gpus, gpus_per_worker)):
        if each <= 0:
            continue
        # Sums of tenths are not exact: room for 2.9999999999 trials is room for 3.
        fit.append(there / (workers * each) + 1e-6)
        if fit[-1] < 1:
            per_worker = math.floor(1000 * there / workers) / 1000
            setting = "search.cpus_per_trial" if name == "CPU" else "train.use_gpu"
            remedy = f"--search.cpus-per-trial {per_worker:g}" if name == "CPU" else "--train.no-use-gpu"
            raise ValueError(
                f"search.workers_per_trial = {workers} with {setting} = {each:g} take {workers * each:g} {name}s, but "
                f"{where} has {there:g} {name}s: take fewer workers, or {remedy}"
            )
    return math.floor(min([*fit, limit or math.inf]))
