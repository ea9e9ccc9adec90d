"""Calls a function in a process that has imported nothing yet.

Ray uses a process again for the tasks of a job, and so of a notebook, and modules that were edited since are in it as
they were. It does so only for tasks with the same environment, so a variable of its own makes a run a new process.
"""

import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

VARIABLE = "PERCEIVER_PIPELINE_PROCESS"


def new_word() -> str:
    """A word that no other call returns."""
    return uuid.uuid4().hex


def call_in_new_process(word: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in another process of this node, which only calls with the same word use again.

    Args:
        word: What `new_word` has returned.
        function: A function of this project.
        arguments: Its arguments.

    Returns:
        What it returns; raises what it raises.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0)(function).options(
        scheduling_strategy=here, runtime_env={"env_vars": {VARIABLE: word}}
    )
    try:
        return ray.get(remote.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
