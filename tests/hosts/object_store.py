"""An object store that the hosts use, images in it, and the memory of the workers that stream them."""

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cluster_state import WORKER
from hosts import OUTSIDE, Hosts
from PIL import Image
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tracking_server import TrackingServer

from pipeline.data.order import MIB, StreamOrder
from pipeline.storage import Storage

SIDE, CLASSES, BATCH = 64, 10, 64
ROW_BYTES = SIDE * SIDE * 3
KEYS = f"'aws_access_key_id = {ACCESS_KEY}' 'aws_secret_access_key = {SECRET_KEY}'"


@contextlib.contextmanager
def served(hosts: Hosts, folder: Path) -> Iterator[tuple[S3Server, TrackingServer]]:
    """An object store whose keys all hosts have, and a tracking server."""
    tracking = TrackingServer(folder, address=OUTSIDE)
    try:
        with S3Server(folder / "store", OUTSIDE) as store:
            for host in (hosts.head, *hosts.workers):
                hosts.ssh(host, f"mkdir -p ~/.aws; printf '%s\\n' '[default]' {KEYS} > ~/.aws/credentials")
                hosts.ssh(host, "printf '%s\\n' '[default]' 'region = us-east-1' > ~/.aws/config")
            yield store, tracking
    finally:
        tracking.kill()


def put_images(storage: Storage, rows: int) -> None:
    """Writes Parquet files of PNG images; the brightness of an image tells its class."""
    rng = np.random.default_rng(0)
    for split, count in {"train": rows, "test": 10 * CLASSES}.items():
        encoded = []
        for number in range(count):
            cells = rng.integers(0, 40, (8, 8, 3), dtype=np.uint8) + np.uint8(20 * (number % CLASSES))
            buffer = io.BytesIO()
            Image.fromarray(cells.repeat(8, 0).repeat(8, 1)).save(buffer, "png", compress_level=1)
            encoded.append({"bytes": buffer.getvalue()})
        table = pa.table({"image": encoded, "label": pa.array(np.arange(count) % CLASSES)})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=1000)
        storage.write_bytes(f"{split}.parquet", sink.getvalue())


def stream(hosts: Hosts, store: S3Server, tracking: TrackingServer, options: tuple[str, ...]) -> tuple[str, int, int]:
    """Runs the pipeline on the digits and on 246 MB of pixels in the store, with a window of 128 MiB.

    Args:
        options: Arguments of both runs.

    Returns:
        What the second run prints, the bytes that a worker holds beyond one of the first run, and those that it may
        hold.
    """
    tiny = (*options, "--train.epochs", "2", "--model.stem", "patches", "--model.patch-size", "8", "--storage")
    own = ("--data.source", "files", "--data.num-shards", "32", "--train.shuffle-window-mb", "128", "--data.path")
    images, digits, runs = (Storage(store.uri.replace("?", f"/{name}?")) for name in ("images", "digits", "streamed"))
    put_images(images, 20_000)
    follow = ("--tracking.uri", tracking.uri)
    with WorkerMemory(hosts) as anyway:
        hosts.submit(*tiny, f"'{digits.uri}'", "--until", "train", *follow)
    with WorkerMemory(hosts) as streaming:
        text = hosts.submit(*tiny, f"'{runs.uri}'", *own, f"'{images.uri}'", *follow).text
    (key,) = runs.list("tasks/preprocess")
    train = runs.read_json(f"tasks/preprocess/{key}/manifest.json")["output"]["splits"]["train"]
    return text, streaming.peak - anyway.peak, formula([shard["rows"] for shard in train["shards"]], 128, workers=2)


def formula(shard_rows: list[int], window_mb: int, workers: int) -> int:
    """Bytes that a worker may hold beyond what it needs anyway, by docs/data.md."""
    order = StreamOrder.of(shard_rows, ROW_BYTES, BATCH, window_mb * MIB, 0)
    lanes = order.lanes // workers
    shards = lanes * (order.depth + 1) + 2
    return ROW_BYTES * (shards * max(shard_rows) + 4 * BATCH // workers)


class WorkerMemory:
    """The largest resident memory of a worker on any host while entered: `peak`, in bytes."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts, self._ended, self.peak = hosts, threading.Event(), 0
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            for host in (self._hosts.head, *self._hosts.workers):
                for pid in host.processes(WORKER):
                    with contextlib.suppress(OSError, KeyError):  # it has ended by now
                        self.peak = max(self.peak, resident(pid))

    def __enter__(self) -> "WorkerMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


def resident(pid: int) -> int:
    """Resident memory in bytes, without what it shares with Ray's object store."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(fields["VmRSS"].split()[0]) - int(fields["RssShmem"].split()[0])) * 1024
