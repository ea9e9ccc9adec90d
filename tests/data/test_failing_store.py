"""Images in an object store that does not answer: it is asked again, and at last the object is named."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_images import write_folders
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server

from pipeline.data.image_containers import read_images
from pipeline.data.labelled_images import list_images
from pipeline.storage import Storage


class Relay:
    """Hands connections on to a server, or closes them at once while `is_down`."""

    def __init__(self, port: int) -> None:
        self.is_down, self._target = False, port
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def go_down(self) -> None:
        self.is_down = True
        for connection in self._open:
            self._end(connection)

    def close(self) -> None:
        self.go_down()
        self._end(self._listener)

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                if self.is_down:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()
        except OSError:
            self._listener.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass
        self._end(source)
        self._end(target)

    @staticmethod
    def _end(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it
        connection.close()


@pytest.fixture
def relayed(tmp_path: Path) -> Iterator[tuple[Relay, str]]:
    """The relay, and the URI of class folders behind it."""
    write_folders(tmp_path / "images")
    with S3Server(tmp_path / "s3") as server:
        relay = Relay(server.port)
        uri = server.uri.replace(f":{server.port}", f":{relay.port}").replace("?", "/flowers?")
        uri = uri.replace("s3://", f"s3://{ACCESS_KEY}:{SECRET_KEY}@")
        Storage(uri).upload(tmp_path / "images", "")
        yield relay, uri
        relay.close()


def test_a_store_that_is_away_for_a_moment_costs_no_image_and_one_that_stays_away_is_named(
    relayed: tuple[Relay, str],
) -> None:
    relay, uri = relayed
    listing = list_images(uri)
    rows = listing.splits["train"]
    whole = list(read_images(listing.tree.root, listing.kind, rows))
    relay.go_down()

    def come_back() -> None:
        time.sleep(0.5)
        relay.is_down = False

    threading.Thread(target=come_back).start()
    assert list(read_images(listing.tree.root, listing.kind, rows)) == whole
    relay.go_down()
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"flowers/train/cat/train00\.png\?.* cannot be read: .*NETWORK_CONNECTION"):
        list(read_images(listing.tree.root, listing.kind, rows))
    assert time.monotonic() - start < 60, "it is asked a limited number of times"
