"""Several hosts on one machine: network, PID, mount, UTS and IPC namespaces joined by a bridge, with an sshd each.

Each has its own address, processes, home and /tmp, and its own copy-on-write view of this machine's file system. They
share one folder, as hosts with an NFS mount do, and a package index on the disk, since no way leads off the bridge. The
machine itself is at the bridge too: from there a person would run `ray up`.
"""

import hashlib
import ipaddress
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HOST_INIT = Path(__file__).with_name("host_init.sh")
BRIDGE = "kprbr0"
NETWORK = ipaddress.ip_network("10.77.0.0/24")
OUTSIDE = str(NETWORK[1])
USER, USER_ID = "ray", 2001
# Of the packages that a host needs; Debian's names.
COMMANDS = {
    "ip": "iproute2",
    "rsync": "rsync",
    "script": "bsdutils",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "unshare": "util-linux",
}

SSHD_CONFIG = """\
HostKey /srv/index/host_key
PidFile none
PermitRootLogin no
AllowUsers ray
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile .ssh/authorized_keys
UsePAM no
UseDNS no
StrictModes no
MaxStartups 50:30:100
MaxSessions 50
"""


class CannotMakeHosts(RuntimeError):
    """This machine lacks something that hosts need; says what."""


def install_what_is_missing() -> None:
    """Installs the Debian packages that hosts need.

    Raises:
        CannotMakeHosts: if this process is not root, or there is no namespace or no package to be had.
    """
    if os.geteuid() != 0:
        raise CannotMakeHosts("hosts need root, for their namespaces")
    missing = [package for command, package in COMMANDS.items() if shutil.which(command) is None]
    if missing:
        if shutil.which("apt-get") is None:
            raise CannotMakeHosts(f"hosts need {', '.join(missing)}, and there is no apt-get to install them")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-q"],
            ["apt-get", "install", "-qy", "--no-install-recommends", *missing],
        ):
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            if result.returncode:
                raise CannotMakeHosts(f"{shlex.join(command)}: {result.stderr.strip()}")
    probe = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--uts",
        "--ipc",
        "--fork",
        "mount",
        "-t",
        "tmpfs",
        "tmpfs",
        "/mnt",
    ]
    result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode:
        raise CannotMakeHosts(f"no namespaces to be had: {result.stderr.strip()}")


@dataclass(frozen=True)
class Output:
    """How a command ended."""

    code: int
    text: str
    seconds: float


class Background:
    """A command that goes on while the test does something else.

    Args:
        folder: for what it says.
        terminal: whether it has one.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        cwd: Path,
        environment: dict[str, str],
        folder: Path,
        terminal: bool = False,
    ) -> None:
        if terminal:
            command = [
                "script",
                "--quiet",
                "--flush",
                "--return",
                "--command",
                shlex.join(map(str, command)),
                "/dev/null",
            ]
        self._start, self.log = time.monotonic(), folder / f"command-{secrets.token_hex(4)}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.PIPE,  # `ray dashboard` ends when there is no more input
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What it has said so far."""
        return _plain(self.log.read_text(errors="replace"))

    def type(self, keys: bytes) -> None:
        """Types `keys` in its terminal."""
        assert self._process.stdin is not None
        self._process.stdin.write(keys)
        self._process.stdin.flush()

    def wait_for(self, pattern: str, seconds: float) -> re.Match[str]:
        """Waits until it says something that `pattern` matches."""

        def said() -> bool:
            assert re.search(pattern, self.text) or self._process.poll() is None, f"no {pattern!r} in\n{self.text}"
            return re.search(pattern, self.text) is not None

        wait_until(said, seconds, f"{pattern!r} is not said in\n{self.text}")
        found = re.search(pattern, self.text)
        assert found is not None
        return found

    def wait(self, seconds: float) -> Output:
        """Waits until it ends."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it takes more than {seconds:g} s:\n{self.text}") from None
        self.kill()
        return Output(self._process.returncode, self.text, time.monotonic() - self._start)

    def kill(self) -> None:
        """Ends it and what it has started; one that has ended is no error."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


class Host:
    """One host.

    Args:
        name: of the host and of its network namespace.
        address: in `NETWORK`.
        hosts: what it belongs to.
    """

    def __init__(self, name: str, address: str, hosts: "Hosts") -> None:
        self.name, self.address, self._hosts = name, address, hosts
        self.link = f"kpr-{address.rpartition('.')[2]}"  # its end at the bridge
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Switches the host on; returns when one can log in."""
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
        """Cuts the power; nothing that was written outlives it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)  # takes PID 1 of the host with it, and that all others
            self._process.wait()
            self._process = None
            subprocess.run(["ip", "netns", "del", self.name], check=True)  # the link goes with it, in a moment
            link = Path("/sys/class/net") / self.link
            wait_until(lambda: not link.exists(), 20, f"{link} does not go")

    def cut(self) -> None:
        """Takes the host's link down."""
        subprocess.run(["ip", "-n", self.name, "link", "set", "eth0", "down"], check=True)

    def mend(self) -> None:
        """Takes the host's link up again."""
        subprocess.run(["ip", "-n", self.name, "link", "set", "eth0", "up"], check=True)
        subprocess.run(["ip", "-n", self.name, "route", "replace", "default", "via", OUTSIDE], check=True)

    def processes(self, pattern: str) -> list[int]:
        """Ids, outside of the host, of its processes whose command line has `pattern`."""
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
    """A head and workers, and a person's machine beside them.

    Args:
        folder: for all that they write.
        num_workers: hosts beside the head.
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

    def ray(self, *arguments: str, timeout: float = 300, check: bool = True) -> Output:
        """Runs `ray ARGUMENTS`, as the person does from the root of the checkout."""
        output = _run(
            [Path(sys.executable).with_name("ray"), *arguments], timeout=timeout, cwd=ROOT, environment=self.environment
        )
        self.seconds["ray " + arguments[0]] = output.seconds
        if check and output.code:
            raise AssertionError(f"ray {shlex.join(arguments)} ended with {output.code}:\n{output.text}")
        return output

    def submit(self, *arguments: str, timeout: float = 300, check: bool = True) -> Output:
        """`ray submit ray_cluster.yaml pipeline/run.py -- ARGUMENTS`."""
        return self.ray("submit", str(self.yaml), "pipeline/run.py", "--", *arguments, timeout=timeout, check=check)

    def start(self, *arguments: str, terminal: bool = False) -> "Background":
        """Runs `ray ARGUMENTS` in the background."""
        command: list[str | Path] = [Path(sys.executable).with_name("ray"), *arguments]
        return Background(command, ROOT, self.environment, self.folder, terminal)

    def start_submit(self, *arguments: str, terminal: bool = False) -> "Background":
        """`submit` in the background."""
        return self.start("submit", str(self.yaml), "pipeline/run.py", "--", *arguments, terminal=terminal)

    def ssh(self, host: Host, command: str, timeout: float = 60) -> Output:
        """Runs `command` in a login shell of the user on `host`, with what Ray's commands have there."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5"]
        flags = [word for option in options for word in ("-o", option)]
        settings = "[ ! -f ~/.keras-perceiver-ray.sh ] || . ~/.keras-perceiver-ray.sh"
        shell = f"bash --login -c {shlex.quote(f'{settings}; {command}')}"
        target = f"{USER}@{host.address}"
        return _run(["ssh", "-i", self.key, *flags, target, shell], timeout=timeout)

    @property
    def environment(self) -> dict[str, str]:
        """Of the person at the machine beside the hosts: a home of their own, and nothing of this machine's Ray."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "PERCEIVER_TEST_SESSION") if name in os.environ}
        scratch = str(self.home / "tmp")
        person = {"HOME": str(self.home), "TMPDIR": scratch, "RAY_TMPDIR": scratch}
        return kept | person | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}

    def write_yaml(self) -> None:
        """The repository's ray_cluster.yaml with what a person fills in."""
        cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
        cluster["provider"]["head_ip"] = self.head.address
        cluster["provider"]["worker_ips"] = [worker.address for worker in self.workers]
        cluster["auth"] = {"ssh_user": USER, "ssh_private_key": str(self.key)}
        self.yaml.write_text(yaml.safe_dump(cluster))

    def _prepare(self) -> None:
        for folder in (self.shared, self.home / ".ssh", self.home / ".ray", self.home / "tmp"):
            folder.mkdir(parents=True)
        _own([self.shared])
        make_key(self.key)
        token = self.home / ".ray/auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        start = time.monotonic()
        self.index = package_index()
        self.seconds["package index"] = time.monotonic() - start
        self.write_yaml()

    def _clear(self) -> None:
        """Removes what a run that was killed has left of the network."""
        for host in (self.head, *self.workers):
            for process in _of_namespace(host.name):
                os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
            subprocess.run(["ip", "link", "del", host.link], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def package_index() -> Path:
    """What the hosts install, brought to this machine once for each lock.

    Raises:
        CannotMakeHosts: if a package cannot be had.
    """
    installer, lock = ROOT / "clusters/uv.txt", ROOT / "requirements.txt"
    digest = hashlib.sha256(installer.read_bytes() + lock.read_bytes()).hexdigest()[:12]
    index = Path(tempfile.gettempdir()) / f"keras-perceiver-ray-index-{digest}"
    if index.exists():
        return index
    made = Path(tempfile.mkdtemp(prefix="keras-perceiver-ray-index-"))
    made.chmod(0o755)
    wheels, cache, scratch = made / "wheels", made / "uv-cache", made / "scratch"
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
    _check([*download, "-d", wheels, "-r", installer])
    _check([sys.executable, "-m", "venv", scratch])
    _check([scratch / "bin/python", "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels, "uv"])
    _check(
        [scratch / "bin/uv", "pip", "install", "-q", "--cache-dir", cache, "--python", scratch / "bin/python",
         "--require-hashes", "-r", lock]
    )  # fmt: skip
    shutil.rmtree(scratch)
    (made / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /srv/index/wheels\n")
    # Symbolic links: three copies would take 8 GB, and as much of the page cache.
    (made / "uv.toml").write_text('cache-dir = "/srv/index/uv-cache"\noffline = true\nlink-mode = "symlink"\n')
    (made / "sshd_config").write_text(SSHD_CONFIG)
    make_key(made / "host_key")
    _own([cache, *cache.rglob("*")])
    made.rename(index)
    return index


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path, "-C", path.name], check=True)


def wait_until(condition, seconds: float, complaint: str, pause: float = 0.2) -> float:  # type: ignore[no-untyped-def]
    """Waits until `condition()` holds; returns how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{complaint} within {seconds:g} s"
        time.sleep(pause)
    return time.monotonic() - start


def _run(
    command: Sequence[str | Path], *, timeout: float, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> Output:
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        raise AssertionError(f"{command} took more than {timeout:g} s:\n{text}") from None
    return Output(process.returncode, _plain(text), time.monotonic() - start)


def _plain(text: str) -> str:
    """`text` without the colours and the moves of the cursor that are meant for a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def _check(command: Sequence[str | Path]) -> None:
    output = _run(command, timeout=300)
    if output.code:
        raise CannotMakeHosts(f"{' '.join(map(str, command))}: {output.text.strip()[-500:]}")


def _own(paths: Iterable[Path]) -> None:
    for path in paths:
        os.chown(path, USER_ID, USER_ID, follow_symlinks=False)


def _of_namespace(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
