"""Waits until the workers reach one another: TensorFlow would wait an hour for one that is not there, without a word.

It would do so in C++ with Python's lock held, so that nothing could end it but a kill. Imports no TensorFlow.
"""

import contextlib
import errno
import socket
import sys
import time
from collections.abc import Sequence

from .tf_config import cluster

START_SECONDS = 300.0
"""How long `wait_for_workers` waits unless told otherwise."""
SAY_SECONDS = 30.0
"""After which it says for whom it waits."""
_TRY_SECONDS = 2.0
_PAUSE_SECONDS = 0.2


def wait_for_workers(seconds: float = START_SECONDS) -> None:
    """Returns once every worker in TF_CONFIG has been reached from here; to be called before the strategy is created.

    Each worker listens at its own port until it has reached all others. It then is TensorFlow's, which others reach
    just as well. After half a minute a line on standard error says for whom it waits.

    Args:
        seconds: how long the others may take to start.

    Raises:
        TimeoutError: if some are not reached by then; names them and the remedy.
        OSError: if the port of this worker is taken.
        ValueError: if TF_CONFIG is not of the form that TensorFlow wants.
    """
    workers, own = cluster()
    others = [address for address in workers if address != own]
    if own is None or not others:
        return
    with listening(int(own.rpartition(":")[2])):
        missing = unreached(others, min(SAY_SECONDS, seconds))
        if missing and seconds > SAY_SECONDS:
            print(f"{own} waits for the workers at {', '.join(missing)} to start", file=sys.stderr, flush=True)
            missing = unreached(missing, seconds - SAY_SECONDS)
    if missing:
        raise TimeoutError(why_unreached(missing, seconds))


def listening(port: int) -> socket.socket:
    """A socket that listens at `port` of all addresses, and accepts nothing: that one can connect is all that counts.

    Raises:
        OSError: if the port is taken.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1000)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # of a host whose version 6 is turned off, as in many containers
                raise
    return socket.create_server(("", port), backlog=1000)


def unreached(addresses: Sequence[str], seconds: float) -> list[str]:
    """Those of `addresses`, each `host:port`, to which no connection could be made within `seconds`."""
    missing, deadline = list(addresses), time.monotonic() + seconds
    while True:
        missing = [address for address in missing if not _connects(address, max(0.1, deadline - time.monotonic()))]
        if not missing or time.monotonic() >= deadline:
            return missing
        time.sleep(_PAUSE_SECONDS)


def why_unreached(addresses: Sequence[str], seconds: float) -> str:
    """What is wrong, and what to do about it."""
    unknown = [address for address in addresses if not _is_known(address)]
    return (
        f"the workers at {', '.join(addresses)} cannot be reached from {socket.gethostname()} within {seconds:g} s: "
        + (f"the host of {', '.join(unknown)} has no address here (DNS, /etc/hosts); " if unknown else "")
        + "see whether they have been started, and let the hosts of the workers connect to one another at all TCP "
        "ports (firewall, security group)"
    )


def _is_known(address: str) -> bool:
    """Whether the name of a host can be resolved."""
    with contextlib.suppress(OSError, UnicodeError):
        return bool(socket.getaddrinfo(address.rpartition(":")[0].strip("[]"), None))
    return False


def _connects(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, UnicodeError):  # the second for a name such as "a..b"
        socket.create_connection((host.strip("[]"), int(port)), min(_TRY_SECONDS, seconds)).close()
        return True
    return False
