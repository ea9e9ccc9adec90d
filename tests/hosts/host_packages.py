"""Packages for the hosts: Debian packages on this machine, and an index of the Python packages that hosts install."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from host_commands import run

ROOT = Path(__file__).parents[2]
USER, USER_ID = "ray", 2001
# Commands that are needed, and the Debian packages that have them.
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
    """This machine lacks something that hosts need; the message says what."""


def install_what_is_missing() -> None:
    """Installs the Debian packages that hosts need.

    Raises:
        CannotMakeHosts: if this process is not root, cannot create namespaces, or a package cannot be installed.
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
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
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
        raise CannotMakeHosts(f"namespaces cannot be created: {result.stderr.strip()}")


def package_index() -> Path:
    """Folder with the Python packages that hosts install; downloaded once for each lock.

    Raises:
        CannotMakeHosts: if a package cannot be downloaded.
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
    check([*download, "-d", wheels, "-r", installer])
    check([sys.executable, "-m", "venv", scratch])
    check([scratch / "bin/python", "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels, "uv"])
    check(
        [scratch / "bin/uv", "pip", "install", "-q", "--cache-dir", cache, "--python", scratch / "bin/python",
         "--require-hashes", "-r", lock]
    )  # fmt: skip
    shutil.rmtree(scratch)
    (made / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /srv/index/wheels\n")
    # Symbolic links: three copies would take 8 GB, and as much of the page cache.
    (made / "uv.toml").write_text('cache-dir = "/srv/index/uv-cache"\noffline = true\nlink-mode = "symlink"\n')
    (made / "sshd_config").write_text(SSHD_CONFIG)
    make_key(made / "host_key")
    own([cache, *cache.rglob("*")])
    made.rename(index)
    return index


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path, "-C", path.name], check=True)


def check(command: Sequence[str | Path]) -> None:
    output = run(command, timeout=600)
    if output.code:
        raise CannotMakeHosts(f"{' '.join(map(str, command))}: {output.text.strip()[-500:]}")


def own(paths: Iterable[Path]) -> None:
    for path in paths:
        os.chown(path, USER_ID, USER_ID, follow_symlinks=False)
