"""Tells the workers of a Ray Train group about one another in TF_CONFIG, as TensorFlow's strategies want it.

What Ray's own backend does, without importing TensorFlow, which takes 5 s, in the driver and in the controller too. And
a worker that cannot import it says so before any other waits for it.
"""

import importlib
import json
import os
import socket
from dataclasses import dataclass

import ray
from ray.train.backend import Backend, BackendConfig
from ray.util import get_node_ip_address


class WorkerError(RuntimeError):
    """A worker cannot train."""


@dataclass
class TensorFlowConfig(BackendConfig):
    """Hands a group of Ray Train workers to `tf.distribute.MultiWorkerMirroredStrategy`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _TensorFlowBackend


class _TensorFlowBackend(Backend):
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        worker_group.execute(_import_tensorflow)
        addresses = worker_group.execute(_free_address)  # not before, for the ports are free only for the moment
        ranks = range(len(addresses))
        ray.get([worker_group.execute_single_async(rank, _set_tf_config, addresses, rank) for rank in ranks])


def _import_tensorflow() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        importlib.import_module("tensorflow")
    except Exception as error:  # a broken installation raises what it likes
        raise WorkerError(
            f"the worker on {socket.gethostname()} cannot import TensorFlow ({type(error).__name__}: {error}): "
            "install requirements.txt there"
        ) from error


def _free_address() -> str:
    host = get_node_ip_address()
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
