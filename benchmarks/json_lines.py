"""Records of long measurements as JSON lines, appended one by one, so that a killed measurement can continue."""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read(path: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The complete lines. A last one that a kill has cut off is left out; the file stays as it is.

    Args:
        path: The record.
        fields: What every line must have.

    Raises:
        ValueError: if there is no such file, or a line is damaged or of another kind of record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"the record {path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is not None and not set(fields) - row.keys():
            rows.append(row)
        elif line.strip() and not (row is None and number == len(lines)):
            what = f"a JSON object with {', '.join(fields)}" if fields else "a JSON object"
            raise ValueError(f"line {number} of the record {path} is not {what}: give another file, or mend it")
    return rows


def begin(path: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What `read` returns of a record to which lines will be added; makes it if it is not there.

    An hour of measuring shall not end at a file that cannot be written, so this comes before it.

    Raises:
        ValueError: as `read` does, or if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"the record {path} cannot be written: {error.strerror}") from error
    return read(path, fields)


def add(path: Path, row: dict[str, Any]) -> None:
    """Appends a line; creates the file if it does not exist. A last line that a kill has cut off is removed."""
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a line that another process is writing now is not cut off
        file.seek(0)
        contents = file.read()
        rest = contents[contents.rfind(b"\n") + 1 :]
        start = b""
        if rest and _parsed(rest) is not None:
            start = b"\n"  # whole, but an editor left out the end of the line
        elif rest:
            file.truncate(len(contents) - len(rest))
        line = start + json.dumps(row).encode() + b"\n"
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
