"""What the training needs of Ray Train and cannot have by a public name. No other module touches Ray's private names.

`check_ray` names what an upgrade of Ray has changed.
"""

import importlib
from collections.abc import Callable
from typing import Any

import ray

# How often Ray's controller asks the workers, and how long it waits for a group to start: Ray reads both from the
# environment only, and would not say so if they had other names one day.
POLL_SECONDS_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
START_SECONDS_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

IDLE_SECONDS = 365 * 24 * 3600
"""How long Ray keeps a process that waits for an actor."""
ANSWER_SECONDS = 10.0
"""How long the raylet of a host may take to answer."""

# What is used, by module: a name and, after an equals sign, the value that it must have.
PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    "ray.train.v2._internal.constants": (
        f"HEALTH_CHECK_INTERVAL_S_ENV_VAR={POLL_SECONDS_VARIABLE}",
        f"WORKER_GROUP_START_TIMEOUT_S_ENV_VAR={START_SECONDS_VARIABLE}",
    ),
    "ray.train.v2._internal.exceptions": ("WorkerGroupStartupTimeoutError",),
    "ray.train.v2._internal.execution.context": ("get_train_context", "TrainContext"),
    "ray.train.v2._internal.execution.preemption": ("PreemptionContext",),
    # Of the processes in reserve.
    "ray._private.runtime_env.setup_hook": ("export_setup_func_callable",),
    "ray._private.worker": ("global_worker",),
    "ray._private.grpc_utils": ("init_grpc_channel",),
    "ray.core.generated.node_manager_pb2": ("PrestartWorkersRequest",),
    "ray.core.generated.node_manager_pb2_grpc": ("NodeManagerServiceStub",),
}
# Fields of dataclasses among them.
PRIVATE_FIELDS = {
    "ray.train.v2._internal.execution.context.TrainContext": "preemption_context",
    "ray.train.v2._internal.execution.preemption.PreemptionContext": "preemption_info",
}


def check_ray() -> None:
    """Compares the private names that this module relies on with the installed Ray.

    Raises:
        RuntimeError: if one is gone or has another value; names it and the Ray version.
    """
    remedy = "read the Ray source beside it and adapt pipeline/workers/ray_internals.py, or pin Ray 2.60"
    for module, names in PRIVATE_NAMES.items():
        for expected in names:
            name, _, value = expected.partition("=")
            found = _find(module, name)
            if found is None or (value and found != value):
                raise RuntimeError(f"Ray {ray.__version__} has no {module}.{expected}: {remedy}")
    for owner, field in PRIVATE_FIELDS.items():
        if field not in getattr(_find(*owner.rsplit(".", 1)), "__dataclass_fields__", {}):
            raise RuntimeError(f"Ray {ray.__version__} has no {owner}.{field}: {remedy}")


def preemption_watch() -> Callable[[], bool]:
    """A function that says whether Ray has noticed that a host of the workers is about to be taken away.

    To be called in the training function of a Ray Train worker; what it returns may be called from any thread. The
    public `ray.train.get_preemption_info` waits for all workers to call it too; this is what it reads at each of them.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context().preemption_context
    return lambda: context.preemption_info is not None


def start_timed_out(error: BaseException | None) -> bool:
    """Whether `error` says that a worker group found no room, or did not start for another reason, in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupTimeoutError)


def on_process_start(function: Callable[[], None], environment: dict[str, Any]) -> dict[str, Any]:
    """A runtime environment whose processes call `function` before they get work; an error in it ends the process.

    Ray has this by a public name for all processes of a job alone.

    Args:
        function: Called in each process.
        environment: What the processes have besides; returned as it is where the job of this process has such a
            function already.
    """
    from ray._private.runtime_env.setup_hook import export_setup_func_callable
    from ray._private.worker import global_worker

    if ray.get_runtime_context().runtime_env.get("worker_process_setup_hook"):
        return environment
    return dict(export_setup_func_callable(environment, function, global_worker))


def start_idle_process() -> None:
    """Starts a process on this host that waits for an actor with the runtime environment of this one.

    Ray ends it with the job.

    Raises:
        grpc.RpcError: if the raylet of this host does not answer.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    context = ray.get_runtime_context()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    request = PrestartWorkersRequest(
        job_id=bytes.fromhex(context.get_job_id()), num_workers=1, keep_alive_duration_secs=IDLE_SECONDS
    )
    request.runtime_env_info.serialized_runtime_env = context.get_runtime_env_string()
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_SECONDS)


def is_idle() -> bool:
    """Whether this process of the cluster is no actor yet."""
    return ray.get_runtime_context().get_actor_id() is None


def job_name() -> str:
    """Name of the job of this process, other than those of all other jobs on this host."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address}-{context.get_job_id()}"


def _find(module: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
