"""Every port that a training opens, and whether a stranger can connect to it."""

import socket
from typing import Any

import pytest
from listening import listening_ports
from session_processes import processes_of_this_session
from test_survival import Run, manifest, storage  # noqa: F401  its fixtures

from pipeline.storage import Storage
from pipeline.workflow.task import StoppedEarly

pytestmark = pytest.mark.usefixtures("ray_cluster")
STRANGER = "127.0.0.2"  # workers of one host speak from 127.0.0.1


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 2, (STRANGER, 0)).close()
    except OSError:
        return False
    return True


@pytest.mark.long
def test_strangers_cannot_connect_to_tensorflow(storage: Storage, manifest: dict[str, Any]) -> None:  # noqa: F811
    run = Run(storage, manifest, "ports", epochs=40, early_stopping_patience=40)
    run.start()
    run.wait_for_another_checkpoint()
    commands = processes_of_this_session()
    ports = listening_ports(commands)
    workers = [pid for pid in ports if "RayTrainWorker" in commands[pid]]
    assert len(workers) == 2
    for pid in workers:
        assert len(ports[pid]) == 2
        # One is Ray's own, which asks for the token. It does not always answer in time.
        assert sum(map(can_connect, ports[pid])) <= 1, ports[pid]
    assert run.is_alive(), "the training has ended, and with it TensorFlow's ports"
    for pid, found in ports.items():
        for port in sorted(found):
            print(f"{port} {'open' if can_connect(port) else 'closed'}: {commands[pid][:60]}")
    run.channel.request_stop()
    with pytest.raises(StoppedEarly):
        run.result()
