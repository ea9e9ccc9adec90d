"""Provenance of a run: code version, packages, machine, energy and cost.

The run log of the driver adds settings, seeds and the digest of the data. MLflow's own git tags lack the changes since
the commit, without which a run from a modified checkout cannot be repeated.
"""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.devices import cpu_name
from pipeline.masking import mask, masked

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("keras", "tensorflow", "ray", "mlflow", "numpy", "pyarrow", "optuna")
LONGEST_DIFF = 1_000_000
# Files that have settings of a place, and perhaps its secrets: what was changed in them is nobody else's business.
PRIVATE = ("ray_cluster*.yaml", "clusters/*.yaml", "**/.env", "**/.env.*")
_OF_ANOTHER_REPOSITORY = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
}
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Provenance:
    """Provenance of the current process.

    Attributes:
        tags: Short facts, as MLflow tags.
        texts: Contents of text artifacts by file name: `command.txt`, `packages.txt` and, if the checkout has
            uncommitted changes, `changes.diff`.
    """

    tags: Mapping[str, str]
    texts: Mapping[str, str]


def collect_provenance(root: Path = ROOT) -> Provenance:
    """Collects command, packages, Python version and machine, and commit and changes if `root` is a git checkout."""
    tags = {f"version.{package}": _version(package) for package in PACKAGES}
    tags |= {
        "version.python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": str(os.cpu_count()),
        "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
        "gpus": ", ".join(_gpus()) or "none",
        "command": shlex.join(map(mask, sys.argv)),
    }
    texts = {"command.txt": f"{tags['command']}\n", "packages.txt": _packages()}
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit yet
            tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD").strip()
            exclude, include = ([f":({kind}glob){pattern}" for pattern in PRIVATE] for kind in ("exclude,", ""))
            changes = _git(root, "diff", "HEAD", "--", ".", *exclude)
            private = _git(root, "diff", "--name-only", "HEAD", "--", *include).splitlines()
            changes += "".join(f"Changed, and not shown: {name}\n" for name in private)
            untracked = _git(root, "ls-files", "--others", "--exclude-standard").split("\n")[:-1]
            tags["mlflow.source.git.dirty"] = str(bool(changes or untracked)).lower()
            if changes or untracked:
                texts["changes.diff"] = _changes(changes, untracked)
    return Provenance(masked(tags), masked(texts))


def _changes(diff: str, untracked: Sequence[str]) -> str:
    """The diff to the commit, followed by the names of untracked files."""
    if len(diff) > LONGEST_DIFF:
        diff = f"{diff[:LONGEST_DIFF]}\n(cut: {len(diff):,} characters)\n"
    return diff + "".join(f"Not in git: {name}\n" for name in untracked)


def _git(root: Path, *arguments: str) -> str:
    # Not by the settings of a person, whose diff may be coloured, or the output of another program; nor in the
    # repository that a hook of git names in the environment.
    plain = ["--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/"]
    options = plain if arguments[0] == "diff" else []
    command = ["git", "-C", os.fspath(root), arguments[0], *options, *arguments[1:]]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_REPOSITORY}
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, env=environment)
    return found.stdout


def _version(package: str) -> str:
    """Version of a package; of one that is installed under another name, such as `tensorflow-cpu`, with that name."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    for name in importlib.metadata.packages_distributions().get(package, ()):
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{importlib.metadata.version(name)} ({name})"
    return "unknown"


def _packages() -> str:
    """All installed packages in the format of a requirements file."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items(), key=lambda item: item[0].lower()))


def _gpus() -> list[str]:
    """Names of the GPUs as the NVIDIA driver lists them; loads no library, because that would use GPU memory."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                found.append(line.partition(":")[2].strip())
    return found


def training_cost(history: Sequence[Mapping[str, float]], cpus_per_worker: float) -> dict[str, float]:
    """Cost of a training over all workers: `gpu_hours` of the epochs that computed on GPUs, `core_hours` of the others.

    Args:
        history: `seconds`, `num_workers` and, if there were any, `num_gpus` of each epoch, as the workers saw them. The
            numbers may change between epochs.
        cpus_per_worker: CPUs of each worker.
    """
    gpu_seconds = sum(epoch["seconds"] * epoch.get("num_gpus", 0) for epoch in history)
    on_cpus = [epoch for epoch in history if not epoch.get("num_gpus")]
    core_seconds = sum(epoch["seconds"] * epoch["num_workers"] * cpus_per_worker for epoch in on_cpus)
    found = {"gpu_hours": gpu_seconds / 3600, "core_hours": core_seconds / 3600}
    return {name: hours for name, hours in found.items() if hours}


@dataclass
class EnergyMeter:
    """Energy used by the processors of this host, from the kernel's RAPL counters, if they are readable.

    The counters wrap around, on some machines within the hour: call `sample` more often than that.

    Attributes:
        root: Folder of the counters.
    """

    root: Path = Path("/sys/class/powercap")
    _last: dict[Path, int] = field(default_factory=dict, repr=False)
    _microjoules: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self.sample()

    @property
    def kwh(self) -> float | None:
        """Energy from construction to the last sample, in kWh; None if no counter is readable."""
        return self._microjoules / 1e6 / JOULES_PER_KWH if self._last else None

    def sample(self) -> None:
        """Reads the counters."""
        # Packages only (intel-rapl:0): the counter of a package includes those of its parts (intel-rapl:0:0).
        for zone in sorted(self.root.glob("intel-rapl:[0-9]*")):
            if zone.name.count(":") > 1:
                continue
            try:
                now = int((zone / "energy_uj").read_text())
                spent = now - self._last.get(zone, now)
                if spent < 0:
                    spent += int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):  # on most machines only root may read it
                continue
            self._last[zone] = now
            self._microjoules += spent


def cluster_hardware(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Host name and resources of each node that is alive, from the output of `ray.nodes()`."""
    kept = ("CPU", "GPU", "memory")
    return [
        {"host": node["NodeManagerHostname"], **{name: node["Resources"].get(name, 0) for name in kept}}
        for node in nodes
        if node["Alive"]
    ]
