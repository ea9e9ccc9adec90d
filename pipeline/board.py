"""Where the processes of a run leave word for its driver, and the driver for them: one small Ray actor."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import ray


class _Board:
    """Async, so that waiting for a stop holds up nobody else."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = asyncio.Event()

    async def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    async def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    async def request_stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> None:
        await self._stop.wait()


class Board:
    """Handle of a board, which may be sent to any process of the Ray job that made it."""

    def __init__(self) -> None:
        # Restarted when its process dies, and asked again: what it held is lost then, but not the run.
        options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1, "max_task_retries": -1}
        self._actor: Any = ray.remote(_Board).options(**options).remote()

    def post(self, **event: Any) -> None:
        """Leaves an event for the driver; does not wait for it."""
        self._actor.post.remote(event)

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call, in the order in which they came."""
        return ray.get(self._actor.take.remote())

    def request_stop(self) -> None:
        """Asks all who listen to end with a checkpoint."""
        ray.get(self._actor.request_stop.remote())

    def on_stop(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, on a thread of its own in this process, when a stop is requested."""

        def wait() -> None:
            try:
                ray.get(self._actor.wait_for_stop.remote())
            except ray.exceptions.RayError:
                return  # the driver and its board are gone, or this process is leaving the cluster
            listener()

        threading.Thread(target=wait, daemon=True, name="stop-listener").start()
