"""Two hosts made of network namespaces, whose link `tc` limits; needs root. For `benchmarks/scaling.py`."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = f"scaling-{os.getpid()}-a", f"scaling-{os.getpid()}-b"
ADDRESSES = "10.78.0.1", "10.78.0.2"
PORT = 7001
BURST_BYTES = 96 * 1024
"""What may leave a limited link at once after a pause; the kernel's own packets have up to 64 KiB."""


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Makes the namespaces, joined by one link. Nothing of this machine's own network changes.

    Raises:
        SystemExit: if this user may not; says so.
    """
    _clear()
    first, second = NAMES
    commands = [f"ip netns add {name}" for name in NAMES]
    commands.append(f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}")
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        commands += [
            f"ip -n {name} addr add {address}/24 dev eth0",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set eth0 up",
        ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"error: `{command}`: {done.stderr.strip()}: network namespaces need root")
        yield
    finally:
        _clear()


def limit(bits_per_second: float | None) -> None:
    """Limits what each host may send; None: as fast as the kernel copies."""
    for name in NAMES:
        tc = ["ip", "netns", "exec", name, "tc", "qdisc"]
        subprocess.run([*tc, "del", "dev", "eth0", "root"], capture_output=True)
        if bits_per_second:
            bucket = f"tbf rate {bits_per_second:.0f}bit burst {BURST_BYTES}b limit {2**20}b"
            subprocess.run([*tc, "add", "dev", "eth0", "root", *bucket.split()], check=True)


def run_workers(script: Path, order: dict[str, Any], seconds: float = 240.0) -> list[Any]:
    """Runs `script` on each host with `order`, its rank and TF_CONFIG; what the last line that each prints says.

    Raises:
        RuntimeError: if one fails; has its last lines.
    """
    workers = [f"{address}:{PORT}" for address in ADDRESSES]
    processes = []
    for rank, name in enumerate(NAMES):
        cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
        environment = os.environ | {"TF_CONFIG": json.dumps(cluster), "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = ["ip", "netns", "exec", name, sys.executable, str(script), json.dumps(order | {"rank": rank})]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a worker ended with {process.returncode}:\n{errors[-2000:]}")
    return [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]


def goodput(seconds: float = 1.0) -> float:
    """Bytes a second that one TCP connection carries from each host to the other, both at once as in a ring."""
    code = f"""
import socket, sys, threading, time

own, other = sys.argv[1:]
with socket.create_server((own, {PORT})) as server:
    print("ready", flush=True)
    sys.stdin.readline()

    def send():
        with socket.create_connection((other, {PORT})) as link:
            block, end = bytes(1 << 18), time.perf_counter() + {seconds}
            while time.perf_counter() < end:
                link.sendall(block)

    sender = threading.Thread(target=send)
    sender.start()
    link, _ = server.accept()
    count = start = 0
    while data := link.recv(1 << 20):
        count, now = count + len(data), time.perf_counter()
        if not start and count > 1 << 20:  # what the bucket held and the buffers took
            start, first = now, count
    sender.join()
    print((count - first) / (now - start))
"""
    hosts: list[subprocess.Popen[str]] = []
    try:
        return _carried(hosts, code)
    finally:
        for host in hosts:
            host.kill()


def _carried(hosts: list[subprocess.Popen[str]], code: str) -> float:
    """Starts `code` on both hosts, adds the processes to `hosts`, and returns the smaller of the numbers they print."""
    for name, own, other in zip(NAMES, ADDRESSES, reversed(ADDRESSES), strict=True):
        command = ["ip", "netns", "exec", name, sys.executable, "-c", code, own, other]
        hosts.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for host in hosts:
        assert host.stdout is not None
        host.stdout.readline()
    for host in hosts:
        assert host.stdin is not None
        host.stdin.write("go\n")
        host.stdin.flush()
    return min(float(host.communicate(timeout=60)[0]) for host in hosts)


def _clear() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
