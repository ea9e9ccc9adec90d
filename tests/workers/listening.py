"""The TCP ports at which processes listen, as Linux lists them."""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

LISTEN = "0A"


def listening_ports(pids: Iterable[int]) -> dict[int, set[int]]:
    """Ports of each process, by its id."""
    port_of = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                port_of[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    found: dict[int, set[int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inode = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
                    if inode and inode[1] in port_of:
                        found.setdefault(pid, set()).add(port_of[inode[1]])
    return found
