"""Shards on the disk of a host, for those that read them again and again from an object store.

A file is named by the SHA-256 of the shard and has the shard's bytes. It is renamed into place when it is whole, so
that the processes of a host can share a folder without locks.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GB = 10**9


class CacheError(OSError):
    """The cache cannot take a shard."""


_SUFFIX = ".shard"
_OWN_FILE = re.compile(r"[0-9a-f]{64}\.shard(\.[0-9a-f]{32}\.tmp)?")
"""Names that the cache gives. Whatever else is in the folder belongs to somebody, and neither counts nor goes."""
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PART_SECONDS = 600.0
"""Age at which the part of a file belongs to a process that was killed."""


@dataclass(frozen=True)
class ShardCache:
    """Keeps shards until `limit` bytes are used, then no more: in an endless reading all shards are worth the same."""

    folder: Path
    """Folder on the host's disk; made when first written to."""
    limit: float
    """Bytes that all shards in the folder may take."""
    wanted: frozenset[str]
    """SHA-256 of the shards that are read; others, of earlier data, make room for these."""
    _opened: set[str] = field(default_factory=set, compare=False)

    def get(self, entry: Mapping[str, Any]) -> bytes | None:
        """The bytes of a shard; None if they are not here. A file with other bytes is deleted.

        A process hashes each file at the first time it opens it.
        """
        sha256 = entry["sha256"]
        path = self._path(sha256)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:  # it is not there, or cannot be read: then it cannot be put there either, which is said
            return None
        if sha256 not in self._opened:
            if hashlib.sha256(data).hexdigest() != sha256:
                with contextlib.suppress(PermissionError):  # of another user
                    path.unlink(missing_ok=True)
                return None
            self._opened.add(sha256)
        return data

    def put(self, entry: Mapping[str, Any], data: bytes) -> None:
        """Keeps the verified bytes of a shard if there is room for them below the limit.

        Raises:
            CacheError: if the folder cannot be written or its disk is full; names `train.cache`.
        """
        path = self._path(entry["sha256"])
        part = self.folder / f"{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._make_room(len(data)):
                return
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            remedy = f"give a folder with room for train.cache_gb = {self.limit / GB:g}, or lower that"
            if error.errno in _NOT_ALLOWED:
                remedy = "give a folder that this user can write, such as one of their own"
            raise CacheError(
                f"train.cache = {self.folder} cannot take a shard of {len(data):,} bytes: {error}; {remedy}"
            ) from error
        self._opened.add(entry["sha256"])

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes more stay below the limit, after shards that nobody here reads have been deleted."""
        files = {}
        for file in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if _OWN_FILE.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                    files[Path(file.path)] = file.stat()
        used = sum(found.st_size for found in files.values())
        for path, found in files.items():
            if used + size <= self.limit:
                break
            is_part = path.suffix != _SUFFIX and time.time() - found.st_mtime < _PART_SECONDS
            if path.stem not in self.wanted and not is_part:
                with contextlib.suppress(PermissionError):  # of another user
                    path.unlink(missing_ok=True)
                    used -= found.st_size
        return used + size <= self.limit

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}{_SUFFIX}"
