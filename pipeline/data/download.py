"""The archive of a data set: downloaded or a local copy, and always checked against its SHA-256."""

import hashlib
import os
import re
import shlex
import socket
from pathlib import Path

from pipeline.contact import check_path
from pipeline.data.config import DatasetConfig
from pipeline.data.source import Archive, Source
from pipeline.storage import sha256_of_file

SILENCE_SECONDS = 30.0
"""How long a download may stand still."""


def check_archive(config: DatasetConfig, source: Source) -> None:
    """Checks that the archive that the user names exists and has the checksum that the user gives.

    Raises:
        ValueError: if not; names the option and the remedy.
    """
    if source.archive is None:
        if config.source != "files" and (config.archive is not None or config.sha256 is not None):
            option, value = ("archive", config.archive) if config.archive is not None else ("sha256", config.sha256)
            raise ValueError(f"data.{option} = {value!r}: the source {source.name!r} has no archive; leave it out")
        return
    if config.archive is None:
        if config.sha256 is not None:
            raise ValueError(
                f"data.sha256 = {config.sha256!r}: the checksum of the official archive is known; "
                "leave it out, or give --data.archive PATH too"
            )
        return
    path = os.path.expanduser(config.archive)
    check_path(path, "data.archive")
    if not os.path.isfile(path):
        raise ValueError(
            f"data.archive = {config.archive!r}: no such file; give the path of a {source.name} .tar.gz, "
            "or leave it out to download the official archive"
        )
    remedy = f"`sha256sum {shlex.quote(path)}` prints the file's checksum"
    if config.sha256 is None:
        raise ValueError(f"data.sha256 = None: a local archive is read only with its checksum; {remedy}")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", config.sha256):
        raise ValueError(f"data.sha256 = {config.sha256!r}: must be 64 hexadecimal digits; {remedy}")
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise ValueError(f"data.archive = {config.archive!r} cannot be read: {error}") from error
    _check_sha256(config, found)


def read_archive(config: DatasetConfig, name: str, archive: Archive) -> bytes:
    """The bytes of the archive, after their SHA-256 was checked.

    Args:
        config: Names a local copy, or none.
        name: Name of the source in messages.
        archive: The official archive, which is downloaded if there is no local copy.

    Raises:
        ValueError: if the SHA-256 is another one, or the archive cannot be read or downloaded.
    """
    path = os.path.expanduser(config.archive) if config.archive is not None else _download(name, archive)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"data.archive = {config.archive!r} cannot be read: {error}") from error
    # The very bytes that are decoded are checked: the file may have changed since `check_archive` or the download.
    found = hashlib.sha256(data).hexdigest()
    if config.archive is not None:
        _check_sha256(config, found)
    elif found != archive.sha256:
        raise ValueError(f"{path}: expected SHA-256 {archive.sha256}, found {found}; delete it and run again")
    return data


def _check_sha256(config: DatasetConfig, found: str) -> None:
    if config.sha256 is None or found != config.sha256.lower():
        raise ValueError(
            f"data.sha256 = {config.sha256!r}: {config.archive} has the SHA-256 {found}; "
            "fetch the file again, or give this checksum if the file is the one that you mean"
        )


def _download(name: str, archive: Archive) -> str:
    import keras

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # `get_file` has none
    try:
        return keras.utils.get_file(archive.url.rpartition("/")[2], origin=archive.url, file_hash=archive.sha256)
    except Exception as error:  # `get_file` raises a bare Exception for whatever went wrong
        raise ValueError(
            f"data.source = {name!r}: {error}; or fetch {archive.url} by other means and give "
            f"--data.archive PATH --data.sha256 {archive.sha256}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
