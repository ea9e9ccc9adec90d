"""A folder or an object store as one small interface over `pyarrow.fs`, with reads that are checked against SHA-256.

Paths are relative to the storage root and have forward slashes. A `Storage` pickles as its URI, so that another process
opens it again.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipeline.contact import check_path, check_store, problem_of_file_uri, problem_of_home

READ_AGAIN_AFTER = (0.1, 0.3)
"""Seconds until a JSON file that cannot be read as such is read once more."""


class CorruptFileError(ValueError):
    """The bytes of a file are not those that a manifest names.

    Args:
        path: The file, as a path or URI.
        expected: SHA-256 in the manifest.
        found: SHA-256 of the file; None if there is no file.
    """

    def __init__(self, path: str, expected: str, found: str | None) -> None:
        super().__init__(path, expected, found)
        self.path, self.expected, self.found = path, expected, found

    def __str__(self) -> str:
        state = "is missing" if self.found is None else f"has SHA-256 {self.found}"
        return f"{self.path} {state}; expected SHA-256 {self.expected}: run the task that wrote it again with --force"


class StorageFullError(OSError, ValueError):
    """The disk of the storage has no room, or the user no quota, for a file."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a local file in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mounts_in(folder: str) -> list[str]:
    """Absolute paths of what is mounted at or below a local folder, be it a part of the same disk; sorted."""
    root = os.path.realpath(folder)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in file]
    except OSError:  # a system without /proc
        return []
    return sorted({point for point in points if f"{point}/".startswith(f"{root.rstrip('/')}/")})


def open_storage(uri: str, option: str = "storage", tree: bool = False) -> "Storage":
    """`Storage(uri)`, once it has answered.

    Args:
        option: name of the option that gave `uri`, for messages.
        tree: whether what is mounted below a folder must answer too, because all of it will be listed.

    Raises:
        ValueError: if pyarrow knows no file system for the URI, it may mean another folder than a person who wrote it,
            or the storage does not answer or refuses to.
    """
    if not uri.strip():  # as of a variable of the shell that is not set; it would be the folder of the command
        raise ValueError(f"{option} = {uri!r}: give a folder or a URI that pyarrow.fs takes")
    if problem := _problem_of_uri(uri):
        raise ValueError(f"{option} = {uri!r} {problem}")
    if _is_local(uri):
        check_path(uri.removeprefix("file://"), option, tree)
    elif why := check_store(uri, option):
        try:
            Storage(uri)
        except ValueError as error:  # it is no URI of a storage
            raise ValueError(str(error).replace("storage = ", f"{option} = ", 1)) from error
        raise ValueError(f"{option} = {uri!r} cannot be read and written: {why}")
    return Storage(uri)


def _problem_of_uri(uri: str) -> str | None:
    """Why a URI of a local folder is read in several ways, and the remedy; None if it is not."""
    if problem := problem_of_file_uri(uri) or problem_of_home(uri):
        return problem
    if uri.startswith("file:") and (
        found := sorted(set("%?#") & set(uri))
    ):  # `Storage` takes them as they are, and pyarrow decodes them
        return f"has {' and '.join(found)}, which other programs read as parts of a URI: give the path, without file://"
    return None


def _is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


class Storage:
    """The root below which a pipeline keeps what it makes.

    Args:
        uri: a folder (`./runs`, made when first written to) or a URI that `pyarrow.fs` takes (`s3://bucket/prefix`).

    Raises:
        ValueError: if pyarrow knows no file system for the URI.
    """

    def __init__(self, uri: str) -> None:
        self.is_local = _is_local(uri)
        try:
            if self.is_local:
                path = uri.removeprefix("file://")
                self.filesystem: pafs.FileSystem = pafs.LocalFileSystem()
                self.root = os.path.abspath(os.path.expanduser(path))
                self.uri = self.root
            else:
                self.filesystem, root = pafs.FileSystem.from_uri(uri)
                self.root = root.rstrip("/")
                self.uri = uri.rstrip("/")
        except (OSError, ValueError) as error:
            raise ValueError(f"storage = {uri!r}: {error}; give a folder or a URI that pyarrow.fs takes") from error

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.uri,)

    @staticmethod
    def join(*parts: str) -> str:
        return "/".join(part.strip("/") for part in parts if part)

    def absolute(self, path: str) -> str:
        """The URI (or, of a folder, the absolute path) of `path`, for libraries that take one."""
        root, mark, options = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return f"{root.rstrip('/')}/{path}{mark}{options}" if path else self.uri

    def fs_path(self, path: str) -> str:
        """`path` as `self.filesystem` knows it."""
        return f"{self.root}/{path}" if path else self.root

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(self.fs_path(path)).type != pafs.FileType.NotFound

    def list(self, path: str) -> list[str]:
        """Names of the direct children of `path`, sorted; empty if there is no such folder."""
        selector = pafs.FileSelector(self.fs_path(path), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def read_bytes(self, path: str) -> bytes:
        with self.filesystem.open_input_file(self.fs_path(path)) as file:
            return file.read()  # at once; a stream of unknown length would be read in pieces of 16 KiB

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes the whole file or nothing: an object appears once complete, a local file is renamed into place.

        A local file is on the disk when this returns, also if the host crashes then.

        Raises:
            StorageFullError: if a local disk has no room for it.
        """
        target = self.fs_path(path)
        folder = target.rpartition("/")[0]
        self.filesystem.create_dir(folder, recursive=True)
        if not self.is_local:
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)
            return
        written = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with open(written, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(written)
            if error.errno in _FULL:
                raise StorageFullError(
                    f"{target}, {len(data):,} bytes, cannot be written: {error.strerror}: make room, and give the "
                    "command again"
                ) from error
            raise
        os.replace(written, target)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def write_verified(self, path: str, data: bytes) -> dict[str, Any]:
        """Writes a file; returns its manifest entry `{path, sha256}`."""
        self.write_bytes(path, data)
        return {"path": path, "sha256": hashlib.sha256(data).hexdigest()}

    def upload_verified(self, local: str | Path, path: str) -> dict[str, Any]:
        """Copies a local file to `path`; returns its manifest entry `{path, sha256}`."""
        entry = {"path": path, "sha256": sha256_of_file(local)}
        self.upload(local, path)
        return entry

    def read_verified(self, entry: Mapping[str, Any]) -> bytes:
        """The bytes of the file with this manifest entry (`path`, `sha256`).

        Raises:
            CorruptFileError: if the file is missing or has other bytes.
        """
        path, expected = entry["path"], entry["sha256"]
        try:
            data = self.read_bytes(path)
        except FileNotFoundError as error:
            raise CorruptFileError(self.absolute(path), expected, None) from error
        if (found := hashlib.sha256(data).hexdigest()) != expected:
            raise CorruptFileError(self.absolute(path), expected, found)
        return data

    def download_verified(self, entry: Mapping[str, Any], local: str | Path) -> None:
        """Copies the file with this manifest entry (`path`, `sha256`) to `local`.

        Raises:
            CorruptFileError: if the file is missing or has other bytes.
        """
        path, expected = entry["path"], entry["sha256"]
        try:
            self.download(path, local)
        except FileNotFoundError as error:
            raise CorruptFileError(self.absolute(path), expected, None) from error
        if (found := sha256_of_file(local)) != expected:
            raise CorruptFileError(self.absolute(path), expected, found)

    def read_json(self, path: str) -> Any:
        """The value of a JSON file.

        Another process may replace it meanwhile: an object store under load gave the new content with the length of
        the one before. What is no JSON is therefore read again.

        Raises:
            ValueError: if it is none.
        """
        try:
            for pause in READ_AGAIN_AFTER:
                with contextlib.suppress(ValueError):
                    return json.loads(self.read_bytes(path))
                time.sleep(pause)
            return json.loads(self.read_bytes(path))
        except RecursionError as error:
            raise ValueError(f"{self.absolute(path)} is nested too deeply to be read") from error

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")

    def delete(self, path: str) -> None:
        """Removes a file or a tree; one that is not there is no error.

        Raises:
            OSError: if something is mounted in the tree, which would be emptied.
        """
        info = self.filesystem.get_file_info(self.fs_path(path))
        if self.is_local and info.type == pafs.FileType.Directory and (mounted := mounts_in(info.path)):
            raise OSError(errno.EBUSY, "is mounted, so what it is in is not deleted: unmount it", mounted[0])
        # Another process may be quicker; and some object stores list a folder after its last object is gone.
        with contextlib.suppress(FileNotFoundError):
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(info.path)
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(info.path)

    def upload(self, local: str | Path, path: str) -> None:
        """Copies a local file or tree to `path`."""
        self._copy(pafs.LocalFileSystem(), os.path.abspath(local), self.filesystem, self.fs_path(path))

    def download(self, path: str, local: str | Path) -> None:
        """Copies the file or tree at `path` to `local`."""
        self._copy(self.filesystem, self.fs_path(path), pafs.LocalFileSystem(), os.path.abspath(local))

    @staticmethod
    def _copy(source_fs: pafs.FileSystem, source: str, target_fs: pafs.FileSystem, target: str) -> None:
        kind = source_fs.get_file_info(source).type
        if kind == pafs.FileType.NotFound:
            raise FileNotFoundError(source)
        target_fs.create_dir(target.rpartition("/")[0] if kind == pafs.FileType.File else target, recursive=True)
        pafs.copy_files(source, target, source_filesystem=source_fs, destination_filesystem=target_fs)
