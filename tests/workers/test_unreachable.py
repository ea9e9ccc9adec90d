"""A worker that the others cannot reach ends the start in an error that names it; TensorFlow alone waits an hour."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_survival import Run, manifest, storage  # noqa: F401  its fixtures

from pipeline.multiworker import rendezvous
from pipeline.storage import Storage
from pipeline.workers import tensorflow_backend
from pipeline.workers import train as training
from pipeline.workers.in_process import TrainingError
from pipeline.workers.tensorflow_backend import TensorFlowConfig, WorkerError, _listen, _TensorFlowBackend

MULTIWORKER = Path(__file__).parents[2] / "pipeline" / "multiworker"
# TensorFlow, which takes 5 s to import, is not needed: two modules of the package, without what it imports itself.
ALONE = (
    "import sys, time, types; package = sys.modules['alone'] = types.ModuleType('alone'); "
    "package.__path__ = [sys.argv[1]]; from alone import rendezvous; "
)


def firewalled() -> type[TensorFlowConfig]:
    """A backend whose second worker has a firewall; its classes are local, so that Ray's processes get them whole."""
    from typing import Any

    def listen_behind_a_firewall(address: str) -> None:
        """The kernel drops what comes to the port of this worker, as a firewall of its host would."""
        from pipeline.workers.port_filter import restrict

        _listen(address)
        restrict(int(address.rpartition(":")[2]), ["192.0.2.1"])

    class FirewalledBackend(_TensorFlowBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            class Group:
                def execute(self, function: Any, *arguments: Any) -> Any:
                    return worker_group.execute(function, *arguments)

                def execute_single_async(self, rank: int, function: Any, *arguments: Any) -> Any:
                    hidden = rank == 1 and function.__name__ == "_listen"
                    return worker_group.execute_single_async(
                        rank, listen_behind_a_firewall if hidden else function, *arguments
                    )

            super().on_start(Group(), backend_config)

    class FirewalledConfig(TensorFlowConfig):
        @property
        def backend_cls(self) -> type[_TensorFlowBackend]:
            return FirewalledBackend

    return FirewalledConfig


@pytest.mark.slow  # the start is tried four times, 20 s each
@pytest.mark.usefixtures("ray_cluster")
def test_a_training_whose_workers_do_not_reach_one_another_ends(
    storage: Storage,  # noqa: F811
    manifest: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "TensorFlowConfig", firewalled())
    run = Run(storage, manifest, "unreachable", max_failures=0)
    start = time.monotonic()
    run.start()
    with pytest.raises(TrainingError, match=r"^the workers at 127\.0\.0\.1:\d+ cannot be reached from .* within 20 s"):
        run.result(280)
    print(f"ended after {time.monotonic() - start:.1f} s")


def test_a_script_says_for_whom_it_waits_and_ends() -> None:
    code = ALONE + "rendezvous.SAY_SECONDS = 0.5; rendezvous.wait_for_workers(1.5)"
    environment = os.environ | {
        "TF_CONFIG": '{"cluster": {"worker": ["127.0.0.1:0", "127.0.0.1:9"]}, "task": {"type": "worker", "index": 0}}'
    }
    command = [sys.executable, "-c", code, str(MULTIWORKER)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    first, *_, last = result.stderr.splitlines()
    assert first == "127.0.0.1:0 waits for the workers at 127.0.0.1:9 to start"
    assert last.startswith("TimeoutError: the workers at 127.0.0.1:9 cannot be reached from")
    assert "firewall" in last


@pytest.mark.parametrize("host", ["worker-3.invalid", "a..b"])
def test_a_host_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def lookup(name: str, *_: Any, **__: Any) -> list[Any]:
        name.encode("idna")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert rendezvous.unreached([f"{host}:1"], 0) == [f"{host}:1"]
    assert f"the host of {host}:1 has no address here" in rendezvous.why_unreached([f"{host}:1"], 1)


def test_an_address_of_ray_that_the_host_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorflow_backend, "get_node_ip_address", lambda: "192.0.2.1")  # of no host (RFC 5737)
    with pytest.raises(WorkerError, match=r"cannot listen at 192\.0\.2\.1.*--node-ip-address"):
        tensorflow_backend._free_address()


def test_workers_that_start_one_after_the_other_find_each_other() -> None:
    code = ALONE + "time.sleep(float(sys.argv[2])); "
    # Then each takes its port again, as TensorFlow's server does.
    code += "rendezvous.wait_for_workers(20); server = rendezvous.listening(int(sys.argv[3])); time.sleep(2)"
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [server.getsockname()[1] for server in (one, two)]
    processes = []
    for index, port in enumerate(ports):
        workers = [f"127.0.0.1:{port}" for port in ports]
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        command = [sys.executable, "-c", code, str(MULTIWORKER), str(index), str(port)]
        processes.append(subprocess.Popen(command, env=os.environ | {"TF_CONFIG": json.dumps(config)}))
    assert [process.wait(60) for process in processes] == [0, 0]
