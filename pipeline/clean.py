"""Lists the contents of a storage folder by task and size, and deletes what no registered model needs.

    python -m pipeline.clean runs                lists, and shows what would be deleted
    python -m pipeline.clean runs --remove       deletes it

A registered version needs the tasks that made it and the report on it. Of a finished task, the state that an
interrupted attempt would resume from is not needed, except for the trials of a search, which later searches reuse.
What is younger than `--keep-hours` stays, because a run may be using it, and so does every task of a run that a driver
has claimed, with all that these were made from. Each version is looked up in the registry that its run has recorded;
what a registry that cannot be asked may need stays. MLflow's own files, files of other programs and what is behind a
link or a mount are not touched. Exit codes: 0 done, 2 an argument cannot be used.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.command import end, run_command
from pipeline.contact import check_path
from pipeline.driver.progress import make_console
from pipeline.kept import (
    Files,
    Registries,
    age,
    claimed_keys,
    files_below,
    find_kept,
    hours_since,
    read_claims,
)
from pipeline.masking import printable
from pipeline.storage import Storage, mounts_in, open_storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import read_manifest

MANIFEST = "manifest.json"
# What the pipeline writes, and nothing else may be deleted: folders of tasks by their keys, and what lies in them. Each
# run also leaves a file `runs/KEY.json`.
KEY, CHILD = re.compile(r"[0-9a-f]{64}"), re.compile(r"manifest\.json|state|attempt-[0-9a-f-]+|.*\.tmp")
RUN_FILE = re.compile(r"[0-9a-f]{64}\.json")


@dataclass(frozen=True)
class CleanOptions:
    """The storage folder, and what to delete in it."""

    storage: tyro.conf.Positional[str] = "./runs"
    """Folder, or URI that pyarrow.fs takes, with the outputs of runs."""
    remove: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what is not needed; without this flag nothing changes."""
    keep_hours: float = 24.0
    """Keep what was written within this number of hours, and what it was made from."""
    tracking_uri: str | None = None
    """MLflow tracking URI, with its login, of the registry that runs have recorded without it. Other registries are
    asked under the URI that each run has recorded."""
    moved_from: str | None = None
    """What runs have recorded as the URI of the registry that is at `tracking_uri` now, if it has moved."""

    def __post_init__(self) -> None:
        if not self.keep_hours >= 0:
            raise ValueError(f"keep_hours = {self.keep_hours}: give 0 or more")
        if self.moved_from and not self.tracking_uri:
            raise ValueError(f"moved_from = {self.moved_from!r}: give --tracking-uri, the URI that it has now")


@dataclass(frozen=True)
class Item:
    """A file or folder that is kept or deleted as a whole.

    Attributes:
        path: Path below the root of the storage.
        task: Name of the task.
        kind: `output` of a finished task; `unfinished` attempts; `state` or `attempt`, left over from a finished task.
        size: Size in bytes.
        hours: Hours since the last write.
        needed: Whether a registered version, something recent or a run that a driver has claimed needs it.
        has_manifest: Whether it holds the manifest, which is deleted first: without it the task is not finished.
    """

    path: str
    task: str
    kind: str
    size: int
    hours: float
    needed: bool = False
    has_manifest: bool = False


@dataclass(frozen=True)
class Contents:
    """What a storage holds.

    Attributes:
        items: Everything that tasks have written, ordered by path.
        notes: Sentences that say what stays in doubt, and what to do about it.
        claimed: Keys of the runs and tasks that drivers had claimed before.
    """

    items: list[Item]
    notes: list[str]
    claimed: set[str]


def list_contents(storage: Storage, options: CleanOptions) -> Contents:
    """What the storage holds, and what of it is needed.

    Raises:
        ValueError: If there is no registry at `tracking_uri`, or a manifest is none.
    """
    claims = read_claims(storage)  # first: a task that is finished meanwhile is then listed as such
    contents, left_alone = _contents(storage)
    folders = sorted(contents)
    files = {path: info for content in contents.values() for path, info in content.items()}
    manifests = {
        folder: read_manifest(storage, f"{folder}/{MANIFEST}", folder.split("/")[1])
        for folder in folders
        if f"{folder}/{MANIFEST}" in files
    }
    staying = {}
    for folder in left_alone:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):  # it may be another program's
            staying[folder] = read_manifest(storage, f"{folder}/{MANIFEST}", folder.split("/")[1])
    recent = {folder for folder in folders if hours_since(contents[folder]) < options.keep_hours}
    registries = Registries(options.tracking_uri, options.moved_from)
    kept = find_kept(storage, claims, folders, manifests | staying, recent | staying.keys(), registries)
    items: list[Item] = []
    for folder in folders:
        own, needed, finished = contents[folder], folder in kept.needed, folder in manifests
        if needed and finished and folder not in kept.whole:
            items += _items_of_needed_task(folder, own, manifests[folder]["attempt"])
        else:
            kind = "output" if finished else "unfinished"
            items.append(_item(folder, kind, own, needed=needed, has_manifest=finished))
    return Contents(items, kept.notes, {claim.key for claim in claims})


def _contents(storage: Storage) -> tuple[dict[str, Files], list[str]]:
    """The files of each folder of a task, by its path; and the folders that are left alone.

    The latter are those of other programs, and what is behind links or mounts.
    """
    found, left_alone = {}, []
    mounted = _mounts(storage)
    for task in TASKS:
        home = f"tasks/{task.name}"
        behind_link = _is_link(storage, "tasks") or _is_link(storage, home)
        for key in filter(KEY.fullmatch, storage.list(home)):
            folder = f"{home}/{key}"
            is_mounted = any(
                f"{folder}/".startswith(f"{point}/") or point.startswith(f"{folder}/") for point in mounted
            )
            if behind_link or is_mounted or _is_link(storage, folder):
                left_alone.append(folder)
            elif all(map(CHILD.fullmatch, storage.list(folder))):
                found[folder] = files_below(storage, folder)
            else:
                left_alone.append(folder)
    return {folder: files for folder, files in found.items() if files}, left_alone


def _mounts(storage: Storage) -> list[str]:
    """Paths below the root of the storage at which something is mounted, be it a part of the same disk."""
    if not storage.is_local:
        return []
    root = os.path.realpath(storage.root).rstrip("/") + "/"
    # The storage itself may be a disk of its own.
    return [point.removeprefix(root) for point in mounts_in(root) if point.startswith(root)]


def _is_link(storage: Storage, path: str) -> bool:
    if not storage.is_local or not os.path.islink(storage.fs_path(path)):
        return False
    check_path(storage.fs_path(path), "storage")  # what it leads to may be a network folder that hangs
    return True


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
    return Item(path, path.split("/")[1], kind, size, hours_since(files), needed, has_manifest)


def clean(options: CleanOptions, console: Console | None = None) -> int:
    """Lists the contents and, with `remove`, deletes what is not needed; returns the size of the latter in bytes.

    Raises:
        ValueError: As `list_contents`, if the storage does not exist, or if a run begins meanwhile.
    """
    console, storage = console or make_console(), open_storage(options.storage, tree=True)
    if not storage.exists(""):
        raise ValueError(f"storage = {options.storage!r}: no such folder")
    contents = list_contents(storage, options)
    items = contents.items
    if items and not any(map(RUN_FILE.fullmatch, storage.list("runs"))):
        raise ValueError(
            f"storage = {options.storage!r} has no runs/KEY.json, which every run leaves: it is not the storage of a "
            "pipeline; give that"
        )
    deleted = [item for item in items if not item.needed and item.hours >= options.keep_hours]
    _show(items, deleted, options, console)
    for point in _mounts(storage):
        console.print(escape(f"not touched, because something is mounted there: {point}"))
    for note in contents.notes:
        console.print(escape(printable(note)))
    if options.remove:
        for item in deleted:
            if claimed_keys(storage) - contents.claimed:
                raise ValueError(
                    f"storage = {options.storage!r}: a run has begun meanwhile, which may need what is left of the "
                    "list above: give the command again"
                )
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


def _below(files: Files, folder: str) -> Files:
    return {path: info for path, info in files.items() if path.startswith(f"{folder}/")}


def _show(items: Sequence[Item], deleted: Sequence[Item], options: CleanOptions, console: Console) -> None:
    table = Table("task", "key", "what", "size", "written", "", title=escape(f"{options.storage}: {_size(items)}"))
    for item in sorted(items, key=lambda item: (-item.size, item.path)):
        fate = "needed" if item.needed else "goes" if item in deleted else "recent, stays"
        key = item.path.split("/")[2][:12]
        table.add_row(item.task, key, item.kind, _size([item]), age(item.hours), fate)
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


def run() -> int:
    clean(tyro.cli(CleanOptions, prog="python -m pipeline.clean", description=__doc__))
    return 0


def main() -> int:
    return run_command(run)


if __name__ == "__main__":
    end(main())
