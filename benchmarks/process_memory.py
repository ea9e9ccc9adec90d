"""Processes below another one and their resident memory, from /proc; for `benchmarks/worker_memory.py`."""

import contextlib
import os
from pathlib import Path


def below(root: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def in_memory(pid: int) -> tuple[int, int]:
    """Resident memory in bytes without what is shared with Ray's object store, and what of it is not from files."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident, unshared, shared = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssShmem"))
    return resident - shared, unshared
