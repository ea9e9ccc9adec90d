"""Tells the workers of a Ray Train group about one another in TF_CONFIG, as TensorFlow's strategies want it.

What Ray's own backend does, without importing TensorFlow, which takes 5 s, in the driver and in the controller too. And
a worker that cannot import it says so before any other waits for it. And the port at which a worker hears the others,
which TensorFlow opens to everybody, is closed to all but them.
"""

import importlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.train.backend import Backend, BackendConfig
from ray.util import get_node_ip_address

from pipeline.devices import GpuError, precision_advice, require_gpu
from pipeline.training.worker import WorkersStarted
from pipeline.workers.port_filter import PortGuard, restrict
from pipeline.workflow.channel import Channel

LOOPBACK = "127.0.0.1"
PEERS_VARIABLE = "PERCEIVER_PEERS"
"""Environment variable of a worker: the addresses at which it sees the workers of its group, as a list in JSON; null if
its port stays open."""
REACH_SECONDS = 20.0
"""How long the workers, all of which run, may take to reach one another."""
_LISTEN_SECONDS = 5.0
"""How long TensorFlow's port may take to listen when the strategy exists."""


class WorkerError(RuntimeError):
    """A worker cannot train."""


@dataclass
class TensorFlowConfig(BackendConfig):
    """Hands a group of Ray Train workers to `tf.distribute.MultiWorkerMirroredStrategy`.

    Attributes:
        channel: Gets `WorkersStarted` whenever all workers of a group run.
        use_gpu: Whether each worker must compute on a GPU.
        precision: Keras dtype policy of the training.
        is_perceiver: Whether the model is a Perceiver.
    """

    channel: Channel
    use_gpu: bool
    precision: str = "float32"
    is_perceiver: bool = True

    @property
    def backend_cls(self) -> type[Backend]:
        return _TensorFlowBackend


class _TensorFlowBackend(Backend):
    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        advice = worker_group.execute(
            _import_tensorflow, backend_config.use_gpu, backend_config.precision, backend_config.is_perceiver
        )
        found = worker_group.execute(_free_address)  # not before, for the ports are free only for the moment
        addresses, refused = [address for address, _ in found], [refusal for _, refusal in found if refusal]
        if len({address.rpartition(":")[0] for address in addresses}) == 1:
            # On one host nothing needs to leave it.
            addresses = [f"{LOOPBACK}:{address.rpartition(':')[2]}" for address in addresses]
        open_ports = refused[0] if refused and len(addresses) > 1 else ""
        backend_config.channel.report(WorkersStarted(tuple(addresses), open_ports, next(filter(None, advice), "")))
        if len(addresses) > 1:
            ray.get([worker_group.execute_single_async(rank, _listen, each) for rank, each in enumerate(addresses)])
            worker_group.execute(_reach, addresses)
            worker_group.execute(_stop_listening)
        seen = worker_group.execute(_addresses_seen, addresses)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _set_tf_config, addresses, rank, None if refused else [row[rank] for row in seen]
                )
                for rank in range(len(addresses))
            ]
        )


def guard_port() -> Callable[[], None]:
    """Closes the port of TF_CONFIG to all but the workers of the group, as soon as TensorFlow opens it.

    To be called in a worker before the strategy is made. It does nothing where a kernel of the group refuses filters.

    Returns:
        A function to be called when the strategy has been made; it raises a `WorkerError` if the port is still open.
    """
    tf_config = json.loads(os.environ["TF_CONFIG"])
    workers, rank = tf_config["cluster"]["worker"], tf_config["task"]["index"]
    peers = json.loads(os.environ[PEERS_VARIABLE])
    if len(workers) == 1 or peers is None:  # a single worker opens no port
        return lambda: None
    guard = PortGuard(int(workers[rank].rpartition(":")[2]), peers)
    guard.start()

    def check() -> None:
        try:
            guard.check(_LISTEN_SECONDS)
        except OSError as error:
            raise WorkerError(_refusal(error)) from error

    return check


def _import_tensorflow(use_gpu: bool, precision: str, is_perceiver: bool) -> str:
    """Imports TensorFlow and looks for the GPU, if there must be one; what there is to say of the precision."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        importlib.import_module("tensorflow")
    except Exception as error:  # a broken installation raises what it likes
        raise WorkerError(
            f"the worker on {socket.gethostname()} cannot import TensorFlow ({type(error).__name__}: {error}): "
            "install requirements.txt there"
        ) from error
    if use_gpu:
        try:
            require_gpu("train.use_gpu")
        except GpuError as error:
            raise WorkerError(str(error)) from error
    return precision_advice(precision, use_gpu, is_perceiver)


def _free_address() -> tuple[str, str]:
    """Address of a free port, and why the kernel would not close it to strangers; empty if it would."""
    host = get_node_ip_address()
    refusal = ""
    try:
        server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise WorkerError(
            f"the worker on {socket.gethostname()} cannot listen at {host}, which is the address of that host in Ray "
            f"({error}): start Ray there with --node-ip-address and an address that the host itself has"
        ) from error
    with server:
        port = server.getsockname()[1]
        try:
            restrict(port, [LOOPBACK])
        except OSError as error:
            refusal = _refusal(error)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", refusal


_listener: socket.socket | None = None


def _listen(address: str) -> None:
    """Listens at the port that TensorFlow will open later, so that the others can try whether they reach it."""
    global _listener
    from pipeline.multiworker import rendezvous  # only here, since the package imports TensorFlow

    try:
        _listener = rendezvous.listening(int(address.rpartition(":")[2]))
    except OSError as error:
        raise WorkerError(f"the worker on {socket.gethostname()} cannot listen at {address}: {error}") from error


def _reach(addresses: list[str]) -> None:
    """Tries to connect to all workers: TensorFlow would wait an hour for one that a firewall hides."""
    from pipeline.multiworker import rendezvous

    if missing := rendezvous.unreached(addresses, REACH_SECONDS):
        raise WorkerError(rendezvous.why_unreached(missing, REACH_SECONDS))


def _stop_listening() -> None:
    if _listener:
        _listener.close()


def _addresses_seen(addresses: list[str]) -> list[str]:
    """The address of this host that each of the workers at `addresses` sees; a host may have several."""
    found = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if "[" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host.strip("[]"), int(port)))  # chooses a route, and sends nothing
            found.append(probe.getsockname()[0])
    return found


def _set_tf_config(addresses: list[str], rank: int, peers: list[str] | None) -> None:
    from pipeline.multiworker import bypass_proxies

    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
    os.environ[PEERS_VARIABLE] = json.dumps(None if peers is None else sorted(set(peers)))
    bypass_proxies()  # the import of the package, which does it too, came before TF_CONFIG was set


def _refusal(error: OSError) -> str:
    return (
        f"TensorFlow's port of a worker on {socket.gethostname()} is open to whoever reaches that host: the kernel "
        f"refuses a socket filter ({error}); close it with a firewall (docs/security.md)"
    )
