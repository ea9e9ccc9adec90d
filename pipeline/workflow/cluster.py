"""Joins the Ray cluster that is running or starts one on this machine."""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

import ray

from pipeline.workflow.address import address_to_join

LONGEST_REASON = 400
SHARED_MEMORY = "/dev/shm"
CGROUP = Path("/sys/fs/cgroup")
LEAST_ROOM = 8 << 20
"""Bytes in the temporary folder without which Ray cannot write its first logs."""
# Remedies for errors of `ray.init`, by words in them, all in lower case.
REMEDIES = (
    (
        # Something answers, so that only the token can be wrong; Ray does not say so itself.
        ("authenticat", "token", "unauthorized", "failed to connect to ray cluster"),
        "give this user the cluster's token, in ~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on the head)",
    ),
    (("could not find any running",), "start one with `ray start --head`, or unset RAY_ADDRESS"),
    (("version mismatch",), "install the same versions of Ray and Python as the cluster has"),
    (
        ("timed out during startup", "timed out waiting for file"),
        "this machine is too busy, or one of Ray's processes has ended: give the command again; Ray's logs are in "
        "ray/session_latest/logs of its temporary folder",
    ),
    (("af_unix",), "set RAY_TMPDIR to a folder with a short path, such as /tmp"),
    (("no space left",), "make room in HOME and in RAY_TMPDIR (/tmp if not set), or set them to folders with room"),
    (("home directory", "getpwuid", "uid not found"), "set HOME to a folder of this user"),
    (
        ("permission denied", "not a directory", "file exists", "read-only", "no such file"),
        "set RAY_TMPDIR to a folder that this user may write, and HOME to one of this user",
    ),
)


def join_or_start() -> bool:
    """Joins the Ray cluster that is running, or starts one on this machine; returns whether it has started none.

    A process that is connected already, by an earlier call or by a program around this package, stays so.

    Raises:
        ValueError: if the cluster cannot be joined or started; says why, and the remedy.
    """
    if ray.is_initialized():
        return True
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = address_to_join()
    if not address:
        _check_interpreter()
        _check_room()
    try:
        if address:
            ray.init(address=address, **options)
        else:
            _give_token()
            # Without an address Ray would join any cluster that another program runs on this machine.
            ray.init(address="local", num_cpus=usable_cpus(), include_dashboard=False, **options, **_place_of_objects())
            _hide_token(Path(os.path.expanduser("~")) / ".ray" / "auth_token")
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, OSError, KeyError and errors of its own
        what = f"the cluster at {address} cannot be joined" if address else "Ray cannot be started on this machine"
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {reason[:LONGEST_REASON]} ({type(error).__name__}): {_remedy(error)}") from error
    return address is not None


def usable_cpus() -> int:
    """CPUs of this machine that this process may use: those it may run on, or as many as its container has the time of,
    in whole ones.
    """
    cpus = len(os.sched_getaffinity(0))
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # versions 2 and 1 of cgroups
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says `max`
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in files).split())
            return min(cpus, max(1, quota // period)) if quota > 0 else cpus
    return cpus


def _check_interpreter() -> None:
    """Checks that Ray's processes will start, which the variables of Python reach too.

    Raises:
        ValueError: if they do not, because warnings of libraries are errors for them, or docstrings are left out.
    """
    for name, is_bad in (("PYTHONWARNINGS", "error".__eq__), ("PYTHONOPTIMIZE", lambda value: value not in ("0", "1"))):
        value = os.environ.get(name, "")
        if any(map(is_bad, (part.partition(":")[0].strip() for part in value.split(",") if part))):
            raise ValueError(f"{name} = {value}: Ray's processes do not start with it: unset it")


def _check_room() -> None:
    """Checks that Ray's temporary folder has room; Ray would wait half a minute for a file and not say why.

    Raises:
        ValueError: if it has none. Whatever else is wrong with it Ray says.
    """
    place = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, LEAST_ROOM)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"Ray cannot be started on this machine: its temporary folder {place} has no room for {LEAST_ROOM:,} "
                "bytes: make room there, or set RAY_TMPDIR to a folder with a short path that has"
            ) from error


def _place_of_objects() -> dict[str, Any]:
    """Options of `ray.init`: the temporary folder instead of a shared memory that cannot be written, as in a container
    that is read-only; Ray would wait half a minute for a process that has ended.
    """
    try:
        tempfile.TemporaryFile(dir=SHARED_MEMORY).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # Ray sees itself that it is full
            return {"_plasma_directory": os.environ.get("RAY_TMPDIR", tempfile.gettempdir())}
    return {}


def _give_token() -> None:
    """Gives the cluster of this process a token of its own if Ray can put none into the home of the user."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        folder = Path.home() / ".ray"
        if not (folder / "auth_token").is_file():
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(secrets.token_bytes(64))
    except (OSError, RuntimeError):  # it is read-only, full, or not there
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _hide_token(path: Path) -> None:
    """Lets this user alone read Ray's token, which `ray.init` has written for all to read."""
    with contextlib.suppress(OSError):  # there is none, or it belongs to another user
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)


def _remedy(error: Exception) -> str:
    """What a person can do about an error of `ray.init`, by the words that it has."""
    text = f"{type(error).__name__} {error}".lower()
    for words, remedy in REMEDIES:
        if any(word in text for word in words):
            return remedy
    return "see `ray status` on the head, or unset RAY_ADDRESS to start a cluster on this machine"
