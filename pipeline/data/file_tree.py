"""All files below a folder or a URI: what `pipeline.predict` classifies, and what a source of one's own images is.

Listed without reading a file. Whatever is not listed is counted with the reason, so that nothing is lost in silence.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from pipeline.storage import Storage, open_storage

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
NOT_UTF8, LOOP, HIDDEN = "name is not UTF-8", "link to a folder above it", "hidden"
BROKEN_LINK, OUTPUT = "link that leads nowhere", "in the folder of the results"
SYSTEM = "kept by an operating system"
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def suffix_of(name: str) -> str:
    """`.jpg` of `a/b.JPG`; "" if there is none."""
    return os.path.splitext(name)[1].lower()


@dataclass
class FileTree:
    """Files by their path below `root`, in order of their paths.

    Attributes:
        root: the folder; that of the file, if the input is one file.
        files: size in bytes and time of change in ns.
        folders: paths of all folders that are not hidden.
        left_out: paths that are not among `files`, by reason.
    """

    root: Storage
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def fingerprint(self, names: Iterable[str]) -> str:
        """SHA-256 over names, sizes and times of these files."""
        listing = json.dumps([[name, *self.files[name]] for name in names])
        return hashlib.sha256(listing.encode()).hexdigest()

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def leave_out_others(self, chosen: Iterable[str]) -> None:
        """Leaves out the files that are not among `chosen`, because they are of another kind."""
        for name in sorted(self.files.keys() - set(chosen)):
            self.leave_out(f"file of another kind ({suffix_of(name) or 'no suffix'})", name)


def list_files(uri: str, option: str, output: Storage | None = None) -> FileTree:
    """Lists the files below `uri`, or the one file that it names.

    Names that begin with a dot are hidden. Links are followed.

    Args:
        uri: a folder, a file, or a URI that `pyarrow.fs` takes.
        option: name of the option that gave `uri`, for messages.
        output: a folder below `uri` that is left out.

    Raises:
        ValueError: if there is no such file or folder, or it cannot be listed.
    """
    whole = open_storage(uri, option, tree=True)
    try:
        info = whole.filesystem.get_file_info(whole.fs_path(""))
        if info.type == pafs.FileType.NotFound:
            raise ValueError(f"{option} = {uri!r}: no such file or folder")
        if info.type == pafs.FileType.File:
            path, mark, options = (whole.uri, "", "") if whole.is_local else whole.uri.partition("?")
            folder, _, name = path.rpartition("/")
            return FileTree(Storage(f"{folder}{mark}{options}"), {name: (info.size, _time(info))})
        tree = FileTree(whole)
        found = _walk(whole.root, tree) if whole.is_local else _list(whole, tree)
    except OSError as error:
        raise ValueError(f"{option} = {uri!r} cannot be listed: {error}") from error
    below = None if output is None else _place_below(tree.root, output)
    for path in sorted(found):
        if reason := _why_left_out(path, below):
            tree.leave_out(reason, path)
        else:
            tree.files[path] = found[path]
    tree.folders = sorted(path for path in tree.folders if not _why_left_out(path, below))
    return tree


def check_unchanged(uri: str, option: str, files: Mapping[str, tuple[int, int]], remedy: str) -> None:
    """Checks, after files were read, that they are still those that were listed. New files beside them do not matter.

    Args:
        uri: what was given to `list_files`, as the option `option`.
        files: size and time of each file that was read, as `FileTree` has them.
        remedy: what to do, for the message.

    Raises:
        ValueError: if a file has another size or time, or is gone.
    """
    found = list_files(uri, option).files
    if changed := next((name for name, listed in files.items() if found.get(name) != listed), None):
        raise ValueError(f"{option} = {uri!r}: {changed} has changed while the files were read: {remedy}")


def _why_left_out(path: str, output: str | None) -> str | None:
    parts = path.split("/")
    if any(part.startswith(".") for part in parts):
        return HIDDEN
    if SYSTEM_FOLDERS & set(parts):
        return SYSTEM
    if output is not None and f"{path}/".startswith(output):
        return OUTPUT
    return None


def _place_below(root: Storage, output: Storage) -> str | None:
    """Where `output` is below `root`, with a slash at its end; None if it is not there."""
    outer, inner = _real(root), _real(output)
    if inner == outer:
        return ""
    return f"{inner.removeprefix(f'{outer}/')}/" if inner.startswith(f"{outer}/") else None


def _real(storage: Storage) -> str:
    """The root of a storage, whichever links lead to it."""
    return os.path.realpath(storage.root) if storage.is_local else storage.root


def _time(info: pafs.FileInfo) -> int:
    return info.mtime_ns or 0


def _list(whole: Storage, tree: FileTree) -> dict[str, tuple[int, int]]:
    """Of an object store: one listing, page by page."""
    infos = whole.filesystem.get_file_info(pafs.FileSelector(whole.fs_path(""), recursive=True))
    paths = [(info.path.removeprefix(whole.root).lstrip("/"), info) for info in infos]
    tree.folders = [path for path, info in paths if info.type == pafs.FileType.Directory]
    return {path: (info.size, _time(info)) for path, info in paths if info.type == pafs.FileType.File}


def _walk(root: str, tree: FileTree) -> dict[str, tuple[int, int]]:
    """Of a local folder: pyarrow follows a link that forms a loop, and fails at a name that is not UTF-8."""
    found: dict[str, tuple[int, int]] = {}
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root),))]
    while waiting:
        folder, above = waiting.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}".lstrip("/")
                if entry.name != entry.name.encode(errors="replace").decode():
                    tree.leave_out(NOT_UTF8, os.fsencode(path).decode(errors="backslashreplace"))
                elif not os.path.exists(entry.path):
                    tree.leave_out(BROKEN_LINK, path)
                elif entry.is_dir():
                    if (identity := _identity(entry.path)) in above:
                        tree.leave_out(LOOP, path)
                    else:
                        tree.folders.append(path)
                        waiting.append((path, (*above, identity)))
                elif entry.is_file():
                    status = entry.stat()
                    found[path] = (status.st_size, status.st_mtime_ns)
                else:
                    tree.leave_out("neither a file nor a folder", path)
    return found


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
