"""Lists what a storage folder holds by task and size, and removes what no registered model needs.

    python -m pipeline.clean runs                lists, and says what would be removed
    python -m pipeline.clean runs --remove       removes it

A registered version needs the tasks that it was made by, and its report; of a finished task, not the state from which
an attempt that was cut off would go on, but the trials of a search, which later ones count. What was written within the
last hours stays too: a run may be at it. MLflow's own files are not touched. Exit codes: 0 done, 2 something given
cannot be used.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.fs as pafs
import tyro
from rich.console import Console
from rich.table import Table

from pipeline.progress import make_console
from pipeline.registered_model import registered_uris
from pipeline.storage import Storage

MANIFEST = "manifest.json"
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class CleanOptions:
    """What is looked at, and whether anything is removed."""

    storage: tyro.conf.Positional[str] = "./runs"
    """Folder, or URI that pyarrow.fs takes, in which runs keep what they make."""
    remove: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove what is marked; without it nothing changes."""
    keep_hours: float = 24.0
    """What was written within so many hours stays."""
    tracking_uri: str | None = None
    """MLflow tracking URI of the registry; None: the one that each run has recorded."""

    def __post_init__(self) -> None:
        if not self.keep_hours >= 0:
            raise ValueError(f"keep_hours = {self.keep_hours}: give 0 or more")


@dataclass(frozen=True)
class Entry:
    """One thing that stays or goes as a whole.

    Attributes:
        path: below the storage's root.
        task: whose output or state it is.
        what: `output` of a finished task, `unfinished` attempts, or `state` and `attempt` left over in a finished one.
        size: in bytes.
        hours: since something in it was last written.
        needed: by a registered version.
        manifest: whether it has one, which goes first: half of a tree is then no finished task.
    """

    path: str
    task: str
    what: str
    size: int
    hours: float
    needed: bool
    manifest: bool = False


def entries(storage: Storage, tracking_uri: str | None = None) -> list[Entry]:
    """All that tasks have left in storage, in order of path.

    Raises:
        ValueError: if a registry that a run has recorded is not there.
    """
    files = _files(storage, "tasks")
    homes = sorted({"/".join(path.split("/")[:3]) for path in files if path.count("/") >= 3})
    manifests = {home: storage.read_json(f"{home}/{MANIFEST}") for home in homes if f"{home}/{MANIFEST}" in files}
    needed = _needed(manifests, tracking_uri)
    now, found = time.time(), []
    for home in homes:
        own = {path: info for path, info in files.items() if path.startswith(f"{home}/")}
        task, finished = home.split("/")[1], home in manifests
        kept_folders = (f"{home}/{manifests[home]['attempt']}/", f"{home}/state/trials/") if finished else ()

        def entry(path: str, what: str, infos: Iterable[Any], needed: bool, manifest: bool, task: str = task) -> None:
            infos = list(infos)
            if infos:
                hours = (now - max(info.mtime_ns or 0 for info in infos) / 1e9) / SECONDS_PER_HOUR
                found.append(Entry(path, task, what, sum(info.size for info in infos), hours, needed, manifest))

        if not (finished and home in needed):
            entry(home, "output" if finished else "unfinished", own.values(), False, finished)
            continue
        rests = {"/".join(path.split("/")[:4]) for path in own if not path.startswith(kept_folders)}
        rests -= {f"{home}/{MANIFEST}"}
        rest_of = {rest: [info for path, info in own.items() if path.startswith(f"{rest}/")] for rest in sorted(rests)}
        kept = [info for path, info in own.items() if not any(path.startswith(f"{rest}/") for rest in rests)]
        entry(home, "output", kept, True, True)
        for rest, infos in rest_of.items():
            entry(rest, "state" if rest.endswith("/state") else "attempt", infos, False, False)
    return found


def clean(options: CleanOptions, console: Console | None = None) -> int:
    """Lists what there is and, if asked to, removes what can go; returns the bytes that went or would go.

    Raises:
        ValueError: as `entries`, or if there is no such storage.
    """
    console, storage = console or make_console(), Storage(options.storage)
    if not storage.exists(""):
        raise ValueError(f"storage = {options.storage!r}: no such folder")
    found = entries(storage, options.tracking_uri)
    going = [entry for entry in found if not entry.needed and entry.hours >= options.keep_hours]
    _show(found, going, options, console)
    if options.remove:
        for entry in going:
            if entry.manifest:
                storage.delete(f"{entry.path}/{MANIFEST}")
            storage.delete(entry.path)
    return sum(entry.size for entry in going)


def _needed(manifests: dict[str, dict[str, Any]], tracking_uri: str | None) -> set[str]:
    """Folders of the tasks that a registered version was made by, and of those that follow from its registration."""
    versions: dict[str, set[str]] = {}
    needed: set[str] = set()
    registered = []
    for home, manifest in manifests.items():
        if manifest["task"] != "register":
            continue
        registry = tracking_uri or manifest["output"]["tracking_uri"]
        if registry not in versions:
            _check_registry(registry)
            versions[registry] = registered_uris(registry)
        if manifest["output"]["uri"] in versions[registry]:
            registered.append(home)
    followers = [
        home
        for home, manifest in manifests.items()
        if f"tasks/register/{manifest['inputs'].get('register')}" in registered
    ]
    waiting = [*registered, *followers]
    while waiting:
        home = waiting.pop()
        if home not in needed:
            needed.add(home)
            inputs = manifests[home]["inputs"] if home in manifests else {}
            waiting += [f"tasks/{name}/{key}" for name, key in inputs.items()]
    return needed


def _check_registry(uri: str) -> None:
    """Raises a ValueError if `uri` is an SQLite file that is not there: MLflow would make an empty one."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(f"the registry {uri} is not there, so what it needs is not known: give --tracking-uri")


def _files(storage: Storage, folder: str) -> dict[str, Any]:
    """Every file below `folder`, by its path below the storage's root."""
    selector = pafs.FileSelector(storage.fs_path(folder), recursive=True, allow_not_found=True)
    prefix = storage.fs_path("").rstrip("/") + "/"
    infos = storage.filesystem.get_file_info(selector)
    return {info.path.removeprefix(prefix): info for info in infos if info.type == pafs.FileType.File}


def _show(found: list[Entry], going: list[Entry], options: CleanOptions, console: Console) -> None:
    table = Table("task", "key", "what", "size", "written", "", title=f"{options.storage}: {_size(found)}")
    for entry in sorted(found, key=lambda entry: (-entry.size, entry.path)):
        fate = "needed" if entry.needed else "recent, stays" if entry not in going else "goes"
        key = entry.path.split("/")[2][:12]
        table.add_row(entry.task, key, entry.what, _size([entry]), _age(entry.hours), fate)
    console.print(table)
    by_task = {task: [entry for entry in found if entry.task == task] for task in sorted({e.task for e in found})}
    console.print(", ".join(f"{task} {_size(part)}" for task, part in by_task.items()) or "nothing")
    if options.remove:
        console.print(f"removed: {_size(going)}")
    else:
        console.print(f"would be removed: {_size(going)}" + (" (--remove does it)" if going else ""))


def _size(found: list[Entry]) -> str:
    size = float(sum(entry.size for entry in found))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _age(hours: float) -> str:
    return f"{hours:.0f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"


def main() -> int:
    try:
        clean(tyro.cli(CleanOptions, prog="python -m pipeline.clean", description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
