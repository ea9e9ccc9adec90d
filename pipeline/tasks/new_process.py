"""Calls a function in a process that has imported nothing yet.

Ray uses a process again for the tasks of a job, and so of a notebook, and modules that were edited since are in it as
they were. It does so only for tasks with the same environment, so a variable of its own gets a run a new process.
"""

import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

VARIABLE = "PERCEIVER_PIPELINE_PROCESS"


def new_call_id() -> str:
    """Id of a call of `train_own_model`, which no other call gets."""
    return uuid.uuid4().hex


def call_in_new_process(call_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in another process of this node, which Ray gives again only to calls with the same id.

    Args:
        call_id: What `new_call_id` has returned.
        function: A function of this project.
        arguments: Its arguments.

    Returns:
        What it returns; raises what it raises.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0)(function).options(
        scheduling_strategy=here, runtime_env={"env_vars": {VARIABLE: call_id}}
    )
    try:
        return ray.get(remote.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
