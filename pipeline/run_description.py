"""What a run says of itself, so that it can be repeated and its cost is known: code, versions, machine, energy.

Settings, seeds and the digest of the data are recorded by `pipeline.runlog`; this is what only the machine knows.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("keras", "tensorflow", "ray", "mlflow", "numpy", "pyarrow", "optuna")
LONGEST_DIFF = 1_000_000
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Description:
    """Of the process that calls `describe`, and its host.

    Attributes:
        tags: short facts, to search by.
        texts: artifacts by name: `command.txt`, `packages.txt` and, where the checkout has changes, `changes.diff`.
    """

    tags: Mapping[str, str]
    texts: Mapping[str, str]


def describe(root: Path = ROOT) -> Description:
    """Command, packages, Python, machine, and the commit and changes of the checkout at `root`, if it is one."""
    tags = {f"version.{package}": importlib.metadata.version(package) for package in PACKAGES}
    tags |= {
        "version.python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": str(os.cpu_count()),
        "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
        "gpus": ", ".join(_gpus()) or "none",
        # URLs may carry a password.
        "command": re.sub(r"://[^/@\s]+@", "://***@", shlex.join(sys.argv)),
    }
    texts = {"command.txt": f"{tags['command']}\n", "packages.txt": _packages()}
    if (root / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit yet
            tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD").strip()
            changes = _git(root, "diff", "HEAD")
            untracked = _git(root, "ls-files", "--others", "--exclude-standard").split("\n")[:-1]
            tags["mlflow.source.git.dirty"] = str(bool(changes or untracked)).lower()
            if changes or untracked:
                texts["changes.diff"] = _changes(changes, untracked)
    return Description(tags, texts)


def _changes(diff: str, untracked: Sequence[str]) -> str:
    """The difference to the commit, and the names of files that it does not know."""
    if len(diff) > LONGEST_DIFF:
        diff = f"{diff[:LONGEST_DIFF]}\n(cut: {len(diff):,} characters)\n"
    return diff + "".join(f"Not in git: {name}\n" for name in untracked)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", os.fspath(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout


def _packages() -> str:
    """All that is installed, as `pip install --requirement` takes it."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items(), key=lambda item: item[0].lower()))


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> list[str]:
    """Names of the GPUs whose driver lists them, without loading a library that would take memory on them."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                found.append(line.partition(":")[2].strip())
    return found


def training_cost(
    history: Sequence[Mapping[str, float]], cpus_per_worker: float, gpus_per_worker: int
) -> dict[str, float]:
    """`core_hours` or, where the workers have GPUs, `gpu_hours` of a training, over all its workers.

    Args:
        history: of each epoch its `seconds` and `num_workers`, which may differ from one to the next.
    """
    worker_hours = sum(epoch["seconds"] * epoch["num_workers"] for epoch in history) / 3600
    if gpus_per_worker:
        return {"gpu_hours": worker_hours * gpus_per_worker}
    return {"core_hours": worker_hours * cpus_per_worker}


@dataclass
class EnergyMeter:
    """Energy that the processors of this host take, by the counters of the kernel (RAPL), where they can be read.

    The counters run over, on some machines within the hour: `sample` must be called more often than that.

    Attributes:
        root: folder of the counters.
    """

    root: Path = Path("/sys/class/powercap")
    _last: dict[Path, int] = field(default_factory=dict, repr=False)
    _microjoules: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self.sample()

    @property
    def kwh(self) -> float | None:
        """Since this meter was made, up to the last sample; None if no counter can be read."""
        return self._microjoules / 1e6 / JOULES_PER_KWH if self._last else None

    def sample(self) -> None:
        # Packages only (intel-rapl:0): what lies below one (intel-rapl:0:0) is counted in it.
        for zone in sorted(self.root.glob("intel-rapl:[0-9]*")):
            if zone.name.count(":") > 1:
                continue
            try:
                now = int((zone / "energy_uj").read_text())
                spent = now - self._last.get(zone, now)
                if spent < 0:
                    spent += int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):  # readable by root only, on most machines
                continue
            self._last[zone] = now
            self._microjoules += spent


def cluster_hardware(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Host name and resources of each living node of a cluster, as `ray.nodes()` lists them."""
    kept = ("CPU", "GPU", "memory")
    return [
        {"host": node["NodeManagerHostname"], **{name: node["Resources"].get(name, 0) for name in kept}}
        for node in nodes
        if node["Alive"]
    ]
