"""Several hosts on one machine: network, PID, mount, UTS and IPC namespaces joined by a bridge, with an sshd each.

Each has its own address, processes, home and /tmp, and its own copy-on-write view of this machine's file system. They
share one folder, as hosts with an NFS mount do, and a package index on the disk, since the bridge has no route to other
networks. The machine itself is connected to the bridge too: there the user runs `ray up`.
"""

import ipaddress
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from host_commands import Background, Output, run, wait_until
from host_packages import ROOT, USER, make_key, own, package_index

HOST_INIT = Path(__file__).with_name("host_init.sh")
BRIDGE = "kprbr0"
NETWORK = ipaddress.ip_network("10.77.0.0/24")
OUTSIDE = str(NETWORK[1])


class Host:
    """One host.

    Args:
        name: Name of the host and of its network namespace.
        address: Address in `NETWORK`.
        hosts: The group of hosts that the host belongs to.
    """

    def __init__(self, name: str, address: str, hosts: "Hosts") -> None:
        self.name, self.address, self._hosts = name, address, hosts
        self.link = f"kpr-{address.rpartition('.')[2]}"  # its end at the bridge
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the host; returns when a login succeeds."""
        last = int(self.address.rpartition(".")[2])
        # A fixed hardware address: other hosts know the old one for a while after a restart.
        for command in (
            f"ip netns add {self.name}",
            f"ip link add {self.link} type veth peer name eth0 netns {self.name}",
            f"ip link set {self.link} master {BRIDGE} up",
            f"ip -n {self.name} link set lo up",
            f"ip -n {self.name} link set eth0 address 02:00:0a:4d:00:{last:02x}",
            f"ip -n {self.name} addr add {self.address}/{NETWORK.prefixlen} dev eth0",
            f"ip -n {self.name} link set eth0 up",
            f"ip -n {self.name} route add default via {OUTSIDE}",
        ):
            subprocess.run(command.split(), check=True)
        namespaces = f"ip netns exec {self.name} unshare --mount --pid --uts --ipc --fork --kill-child".split()
        hosts = self._hosts
        mount = hosts.folder / self.name
        mount.mkdir(exist_ok=True)
        settings: list[str | Path] = [self.name, self.address, mount, hosts.shared, hosts.index]
        settings += [os.path.realpath(sys.executable), hosts.key.with_suffix(".pub")]
        with open(self._hosts.folder / f"{self.name}.log", "ab") as log:
            self._process = subprocess.Popen(
                [*namespaces, HOST_INIT, *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, 60, f"{self.name} does not answer")

    def _answers(self) -> bool:
        assert self._process is not None
        log = self._hosts.folder / f"{self.name}.log"
        assert self._process.poll() is None, f"{self.name} cannot be made:\n{log.read_text()}"
        return self._hosts.ssh(self, "true").code == 0

    def stop(self) -> None:
        """Stops the host like a power cut. Everything that it has written is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)  # ends PID 1 of the host, and with it all other processes
            self._process.wait()
            self._process = None
            subprocess.run(["ip", "netns", "del", self.name], check=True)  # removes the link too, a moment later
            link = Path("/sys/class/net") / self.link
            wait_until(lambda: not link.exists(), 20, f"{link} is not removed")

    def cut(self) -> None:
        """Takes the host's link down."""
        subprocess.run(["ip", "-n", self.name, "link", "set", "eth0", "down"], check=True)

    def mend(self) -> None:
        """Takes the host's link up again."""
        subprocess.run(["ip", "-n", self.name, "link", "set", "eth0", "up"], check=True)
        subprocess.run(["ip", "-n", self.name, "route", "replace", "default", "via", OUTSIDE], check=True)

    def processes(self, pattern: str) -> list[int]:
        """Process ids, as seen from outside the host, of its processes whose command line matches `pattern`."""
        if self._process is None:
            return []
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        namespace = os.readlink(f"/proc/{children[0]}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if re.search(pattern, command) and os.readlink(process / "ns/pid") == namespace:
                    found.append(int(process.name))
            except OSError:  # ended meanwhile
                continue
        return found


class Hosts:
    """A head, workers, and the machine of a user beside them.

    Args:
        folder: Folder for all files of the hosts.
        num_workers: Number of hosts beside the head.
    """

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.folder = folder
        self.shared, self.index, self.home = folder / "shared", folder, folder / "home"
        names = ["kpr-head", *(f"kpr-worker{number}" for number in range(1, num_workers + 1))]
        self.head, *self.workers = (Host(name, str(NETWORK[10 + i]), self) for i, name in enumerate(names))
        self.yaml, self.key = folder / "ray_cluster.yaml", self.home / ".ssh/id_ed25519"
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "Hosts":
        self._clear()
        try:
            self._prepare()
            for command in (
                f"ip link add {BRIDGE} type bridge",
                f"ip addr add {OUTSIDE}/{NETWORK.prefixlen} dev {BRIDGE}",
                f"ip link set {BRIDGE} up",
            ):
                subprocess.run(command.split(), check=True)
            for host in (self.head, *self.workers):
                host.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in (self.head, *self.workers):
            host.stop()
        self._clear()

    def ray(self, *arguments: str, timeout: float = 600, check: bool = True) -> Output:
        """Runs `ray ARGUMENTS` as the user does, from the root of the checkout."""
        output = run(
            [Path(sys.executable).with_name("ray"), *arguments], timeout=timeout, cwd=ROOT, environment=self.environment
        )
        self.seconds["ray " + arguments[0]] = output.seconds
        if check and output.code:
            raise AssertionError(f"ray {shlex.join(arguments)} ended with {output.code}:\n{output.text}")
        return output

    def submit(self, *arguments: str, timeout: float = 600, check: bool = True) -> Output:
        """`ray submit ray_cluster.yaml pipeline/run.py -- ARGUMENTS`."""
        return self.ray("submit", str(self.yaml), "pipeline/run.py", "--", *arguments, timeout=timeout, check=check)

    def start(self, *arguments: str, terminal: bool = False) -> "Background":
        """Runs `ray ARGUMENTS` in the background."""
        command: list[str | Path] = [Path(sys.executable).with_name("ray"), *arguments]
        return Background(command, ROOT, self.environment, self.folder, terminal)

    def start_submit(self, *arguments: str, terminal: bool = False) -> "Background":
        """Runs `submit` in the background."""
        return self.start("submit", str(self.yaml), "pipeline/run.py", "--", *arguments, terminal=terminal)

    def ssh(self, host: Host, command: str, timeout: float = 60) -> Output:
        """Runs `command` in a login shell of the user on `host`, with the settings that Ray's commands have there."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5"]
        flags = [word for option in options for word in ("-o", option)]
        settings = "[ ! -f ~/.keras-perceiver-ray.sh ] || . ~/.keras-perceiver-ray.sh"
        shell = f"bash --login -c {shlex.quote(f'{settings}; {command}')}"
        target = f"{USER}@{host.address}"
        return run(["ssh", "-i", self.key, *flags, target, shell], timeout=timeout)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the user beside the hosts: a separate home, and no settings of this machine's Ray."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "PERCEIVER_TEST_SESSION") if name in os.environ}
        scratch = str(self.home / "tmp")
        person = {"HOME": str(self.home), "TMPDIR": scratch, "RAY_TMPDIR": scratch}
        return kept | person | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}

    def write_yaml(self) -> None:
        """Writes the repository's ray_cluster.yaml with the values that a user fills in."""
        cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
        cluster["provider"]["head_ip"] = self.head.address
        cluster["provider"]["worker_ips"] = [worker.address for worker in self.workers]
        cluster["auth"] = {"ssh_user": USER, "ssh_private_key": str(self.key)}
        self.yaml.write_text(yaml.safe_dump(cluster))

    def _prepare(self) -> None:
        for folder in (self.shared, self.home / ".ssh", self.home / ".ray", self.home / "tmp"):
            folder.mkdir(parents=True)
        own([self.shared])
        make_key(self.key)
        token = self.home / ".ray/auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        start = time.monotonic()
        self.index = package_index()
        self.seconds["package index"] = time.monotonic() - start
        self.write_yaml()

    def _clear(self) -> None:
        """Removes the network and the processes that a killed test run has left."""
        for host in (self.head, *self.workers):
            for process in _of_namespace(host.name):
                os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
            subprocess.run(["ip", "link", "del", host.link], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def _of_namespace(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
