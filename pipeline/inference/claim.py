"""The files of a job in its output, and the marks by which they belong to one job.

Two commands that begin at the same moment may both find the output empty. The one that writes `_job.json` last has it.
Whoever writes a part looks there first, and each part says of which job it is, so that none is taken for another's.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.storage import Storage

JOB_FILE, DONE_FILE = "_job.json", "_done.json"
PART_PREFIX = "part-"
DIGEST_KEY = b"job.sha256"
"""In the metadata of a part; those of earlier versions have none."""
_REMEDY = "give the command again with another folder"


def file_name(part: int) -> str:
    """Name of the file with the results of a part."""
    return f"{PART_PREFIX}{part:06d}.parquet"


def digest_of(job: Mapping[str, Any]) -> bytes:
    """What the parts of a job have under `DIGEST_KEY`."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest().encode()


def claim(output: Storage, job: dict[str, Any]) -> None:
    """Marks the output as that of `job`.

    Raises:
        ValueError: If the output belongs to another job, or holds other files.
    """
    if not output.exists(JOB_FILE):
        if output.list(""):
            raise ValueError(
                f"output = {output.uri!r} is not empty and has no results of this command: give another folder"
            )
        output.write_json(JOB_FILE, job)
        return
    before = _read_job(output)
    if not isinstance(before, dict) or before.keys() != job.keys():
        raise ValueError(f"output = {output.uri!r}: {JOB_FILE} is not of this command: give another folder")
    if not any(name.startswith(PART_PREFIX) for name in output.list("")):
        output.write_json(JOB_FILE, job)  # the job before this one has left no results
        return
    if different := [name for name in job if job[name] != before[name]]:
        name = different[0]
        raise ValueError(
            f"output = {output.uri!r} holds results of another {name}: {json.dumps(before[name])}, not "
            f"{json.dumps(job[name])}: give another folder, or delete this one"
        )


def check_claim(output: Storage, job: Mapping[str, Any]) -> None:
    """Checks that the output is still that of `job`.

    Raises:
        ValueError: If another job has claimed it since, or the mark is gone.
    """
    found = _read_job(output) if output.exists(JOB_FILE) else None
    if found != job:
        why = f"{JOB_FILE} is gone or cannot be read" if found is None else "another job has begun to write there"
        raise ValueError(f"output = {output.uri!r}: {why}: {_REMEDY}")


def check_part(output: Storage, job: Mapping[str, Any], name: str, metadata: Mapping[bytes, bytes] | None) -> None:
    """Checks by the metadata of a part that it is one of `job`, or of an earlier version, which wrote no digest.

    Raises:
        ValueError: If another job has written it.
    """
    if (metadata or {}).get(DIGEST_KEY, digest := digest_of(job)) != digest:
        raise ValueError(f"output = {output.uri!r}: another job, which began at the same time, wrote {name}: {_REMEDY}")


def _read_job(output: Storage) -> Any:
    """The content of `JOB_FILE`; None if it is no JSON."""
    try:
        return output.read_json(JOB_FILE)
    except ValueError:
        return None
