"""Lists the contents of a storage folder by task and size, and deletes what no registered model needs.

    python -m pipeline.clean runs                lists, and shows what would be deleted
    python -m pipeline.clean runs --remove       deletes it

A registered version needs the tasks that made it and the report on it. Of a finished task, the state that an
interrupted attempt would resume from is not needed, except for the trials of a search, which later searches reuse.
Files younger than `--keep-hours` stay, because a run may be using them. MLflow's own files, files of other programs and
what is behind a link or a mount are not touched. Exit codes: 0 done, 2 an argument cannot be used.
"""

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow.fs as pafs
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.command import end, run_command
from pipeline.driver.progress import make_console
from pipeline.masking import MASK
from pipeline.registry.fetch import registered_uris
from pipeline.storage import Storage, mounts_in, open_storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import read_manifest

MANIFEST = "manifest.json"
# What the pipeline writes, and nothing else may be deleted: folders of tasks by their keys, and what lies in them. Each
# run also leaves a file `runs/KEY.json`.
KEY, CHILD = re.compile(r"[0-9a-f]{64}"), re.compile(r"manifest\.json|state|attempt-[0-9a-f-]+|.*\.tmp")
RUN_FILE = re.compile(r"[0-9a-f]{64}\.json")
SECONDS_PER_HOUR = 3600
Files = Mapping[str, pafs.FileInfo]


@dataclass(frozen=True)
class CleanOptions:
    """The storage folder, and what to delete in it."""

    storage: tyro.conf.Positional[str] = "./runs"
    """Folder, or URI that pyarrow.fs takes, with the outputs of runs."""
    remove: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what is not needed; without this flag nothing changes."""
    keep_hours: float = 24.0
    """Keep what was written within this number of hours."""
    tracking_uri: str | None = None
    """MLflow tracking URI of the registry; None: the one that each run has recorded."""

    def __post_init__(self) -> None:
        if not self.keep_hours >= 0:
            raise ValueError(f"keep_hours = {self.keep_hours}: give 0 or more")


@dataclass(frozen=True)
class Item:
    """A file or folder that is kept or deleted as a whole.

    Attributes:
        path: Path below the root of the storage.
        task: Name of the task.
        kind: `output` of a finished task; `unfinished` attempts; `state` or `attempt`, left over from a finished task.
        size: Size in bytes.
        hours: Hours since the last write.
        needed: Whether a registered version needs it.
        has_manifest: Whether it holds the manifest, which is deleted first: without it the task is not finished.
    """

    path: str
    task: str
    kind: str
    size: int
    hours: float
    needed: bool = False
    has_manifest: bool = False


def list_items(storage: Storage, tracking_uri: str | None = None) -> list[Item]:
    """Everything that tasks have written to the storage, ordered by path.

    Raises:
        ValueError: If a registry that a run has recorded does not exist.
    """
    contents = _contents(storage)
    folders = sorted(contents)
    files = {path: info for content in contents.values() for path, info in content.items()}
    manifests = {
        folder: read_manifest(storage, f"{folder}/{MANIFEST}", folder.split("/")[1])
        for folder in folders
        if f"{folder}/{MANIFEST}" in files
    }
    needed = _needed_folders(manifests, tracking_uri)
    items: list[Item] = []
    for folder in folders:
        own = contents[folder]
        if folder in needed and folder in manifests:
            items += _items_of_needed_task(folder, own, manifests[folder]["attempt"])
        else:
            finished = folder in manifests
            items.append(_item(folder, "output" if finished else "unfinished", own, has_manifest=finished))
    return items


def _contents(storage: Storage) -> dict[str, Files]:
    """The files of each folder of a task, by its path, without those of other programs and what is behind links."""
    found = {}
    mounted = _mounts(storage)
    for task in TASKS:
        home = f"tasks/{task.name}"
        if _is_link(storage, "tasks") or _is_link(storage, home):
            continue
        for key in filter(KEY.fullmatch, storage.list(home)):
            folder = f"{home}/{key}"
            if any(f"{folder}/".startswith(f"{point}/") or point.startswith(f"{folder}/") for point in mounted):
                continue
            if not _is_link(storage, folder) and all(map(CHILD.fullmatch, storage.list(folder))):
                found[folder] = _files(storage, folder)
    return {folder: files for folder, files in found.items() if files}


def _mounts(storage: Storage) -> list[str]:
    """Paths below the root of the storage at which something is mounted, be it a part of the same disk."""
    if not storage.is_local:
        return []
    root = os.path.realpath(storage.root).rstrip("/") + "/"
    # The storage itself may be a disk of its own.
    return [point.removeprefix(root) for point in mounts_in(root) if point.startswith(root)]


def _is_link(storage: Storage, path: str) -> bool:
    return storage.is_local and os.path.islink(storage.fs_path(path))


def _items_of_needed_task(folder: str, files: Files, attempt: str) -> list[Item]:
    """The output of a finished task that is needed, and what other attempts left in its folder, which is not."""
    kept_folders = (f"{folder}/{attempt}/", f"{folder}/state/trials/")
    # A folder that also holds something that is kept is not deleted as a whole.
    shared = {"/".join(path.split("/")[:4]) for path in files if path.startswith(kept_folders)}
    leftovers = set()
    for path in files:
        if not path.startswith(kept_folders) and path != f"{folder}/{MANIFEST}":
            parts = path.split("/")
            top = "/".join(parts[:4])
            leftovers.add("/".join(parts[:5]) if top in shared else top)
    contents = {leftover: _below(files, leftover) for leftover in sorted(leftovers)}
    removable = {path for inside in contents.values() for path in inside}
    kept = {path: info for path, info in files.items() if path not in removable}
    return [
        _item(folder, "output", kept, needed=True, has_manifest=True),
        *(
            _item(leftover, "state" if leftover.startswith(f"{folder}/state") else "attempt", inside)
            for leftover, inside in contents.items()
            if inside
        ),
    ]


def _item(path: str, kind: str, files: Files, *, needed: bool = False, has_manifest: bool = False) -> Item:
    size = sum(info.size for info in files.values())
    newest = max(info.mtime_ns or 0 for info in files.values()) / 1e9
    return Item(path, path.split("/")[1], kind, size, (time.time() - newest) / SECONDS_PER_HOUR, needed, has_manifest)


def clean(options: CleanOptions, console: Console | None = None) -> int:
    """Lists the contents and, with `remove`, deletes what is not needed; returns the size of the latter in bytes.

    Raises:
        ValueError: As `list_items`, or if the storage does not exist.
    """
    console, storage = console or make_console(), open_storage(options.storage, tree=True)
    if not storage.exists(""):
        raise ValueError(f"storage = {options.storage!r}: no such folder")
    items = list_items(storage, options.tracking_uri)
    if items and not any(map(RUN_FILE.fullmatch, storage.list("runs"))):
        raise ValueError(
            f"storage = {options.storage!r} has no runs/KEY.json, which every run leaves: it is not the storage of a "
            "pipeline; give that"
        )
    deleted = [item for item in items if not item.needed and item.hours >= options.keep_hours]
    _show(items, deleted, options, console)
    for point in _mounts(storage):
        console.print(escape(f"not touched, because something is mounted there: {point}"))
    if options.remove:
        for item in deleted:
            try:
                if item.has_manifest:
                    storage.delete(f"{item.path}/{MANIFEST}")
                storage.delete(item.path)
            except OSError as error:
                raise ValueError(
                    f"storage = {options.storage!r}: {item.path} cannot be deleted ({error}): do it as the user who "
                    "wrote it; what is listed above it may be deleted already"
                ) from error
    return sum(item.size for item in deleted)


def _needed_folders(manifests: Mapping[str, dict[str, Any]], tracking_uri: str | None) -> set[str]:
    """Folders of the tasks that made a registered version, of its registration, and of the tasks that follow it."""
    uris: dict[str, set[str]] = {}
    registered = []
    for folder, manifest in manifests.items():
        if manifest["task"] != "register":
            continue
        registry = tracking_uri or manifest["output"]["tracking_uri"]
        if registry not in uris:
            _check_registry(registry)
            uris[registry] = registered_uris(registry)
        if manifest["output"]["uri"] in uris[registry]:
            registered.append(folder)
    followers = [
        folder
        for folder, manifest in manifests.items()
        if f"tasks/register/{manifest['inputs'].get('register')}" in registered
    ]
    needed: set[str] = set()
    waiting = [*registered, *followers]
    while waiting:
        folder = waiting.pop()
        if folder not in needed:
            needed.add(folder)
            inputs = manifests[folder]["inputs"] if folder in manifests else {}
            waiting += [f"tasks/{name}/{key}" for name, key in inputs.items()]
    return needed


def _check_registry(uri: str) -> None:
    """Raises a ValueError if `uri` is without the login that it had when it was recorded."""
    if f"://{MASK}@" in uri:
        raise ValueError(f"the registry {uri} was recorded without its login: give --tracking-uri")


def _files(storage: Storage, folder: str) -> Files:
    """All files below `folder`, by their path below the root of the storage."""
    selector = pafs.FileSelector(storage.fs_path(folder), recursive=True, allow_not_found=True)
    prefix = storage.fs_path("").rstrip("/") + "/"
    infos = storage.filesystem.get_file_info(selector)
    return {info.path.removeprefix(prefix): info for info in infos if info.type == pafs.FileType.File}


def _below(files: Files, folder: str) -> Files:
    return {path: info for path, info in files.items() if path.startswith(f"{folder}/")}


def _show(items: Sequence[Item], deleted: Sequence[Item], options: CleanOptions, console: Console) -> None:
    table = Table("task", "key", "what", "size", "written", "", title=escape(f"{options.storage}: {_size(items)}"))
    for item in sorted(items, key=lambda item: (-item.size, item.path)):
        fate = "needed" if item.needed else "goes" if item in deleted else "recent, stays"
        key = item.path.split("/")[2][:12]
        table.add_row(item.task, key, item.kind, _size([item]), _age(item.hours), fate)
    console.print(table)
    by_task = {task: [item for item in items if item.task == task] for task in sorted({i.task for i in items})}
    console.print(", ".join(f"{task} {_size(part)}" for task, part in by_task.items()) or "nothing")
    if options.remove:
        console.print(f"removed: {_size(deleted)}")
    else:
        console.print(f"would be removed: {_size(deleted)}" + (" (--remove does it)" if deleted else ""))


def _size(items: Iterable[Item]) -> str:
    size = float(sum(item.size for item in items))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _age(hours: float) -> str:
    return f"{hours:.0f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"


def run() -> int:
    clean(tyro.cli(CleanOptions, prog="python -m pipeline.clean", description=__doc__))
    return 0


def main() -> int:
    return run_command(run)


if __name__ == "__main__":
    end(main())
