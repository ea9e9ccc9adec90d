"""A real PostgreSQL server on this machine, on loopback."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_server import free_port, kill


def binaries() -> Path | None:
    """Folder with `initdb` and `postgres`: from the package pgserver, from Debian, or on the path."""
    found = importlib.util.find_spec("pgserver")
    places = [Path(str(found.origin)).parent / "pginstall" / "bin"] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places += [Path(path).parent for path in [shutil.which("initdb")] if path]
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


@contextlib.contextmanager
def postgresql(password: str | None = None) -> Iterator[str]:
    """URI of a new database; the login has this password, which the server checks."""
    place = binaries()
    if place is None:
        pytest.skip("no PostgreSQL here: pip install pgserver, or apt-get install postgresql")
    # PostgreSQL refuses to run as root, and pytest's folders are root's alone.
    user = next((name for name in ("postgres", "nobody") if _exists(name)), None) if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    (folder / "password").write_text(f"{password}\n")
    for path in (folder, folder / "password") if user else ():
        os.chown(path, pwd.getpwnam(str(user)).pw_uid, -1)
    port = free_port()
    login = ["--auth", "trust"] if password is None else ["--auth", "scram-sha-256", "--pwfile", folder / "password"]
    try:
        made = subprocess.run(
            [place / "initdb", "--pgdata", folder / "data", "--username", "mlflow", *login, "--no-sync"],
            user=user,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        options = ["-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories="]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [str(place / "postgres"), *options], user=user, stdout=log, stderr=log, start_new_session=True
            )
        try:
            while "ready to accept connections" not in (folder / "log").read_text():
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            secret = "" if password is None else f":{password}"
            yield f"postgresql+psycopg2://mlflow{secret}@127.0.0.1:{port}/postgres"
        finally:
            kill(process)
    finally:
        shutil.rmtree(folder)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
