"""Carries events from the processes of a run to its driver, and a stop request back, through one small Ray actor."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import ray


class _Mailbox:
    """The actor. Its methods are async, so that those who wait for a stop request hold up nobody else."""

    def __init__(self) -> None:
        self._events: list[object] = []
        self._stop = asyncio.Event()

    async def put(self, event: object) -> None:
        self._events.append(event)

    async def take(self) -> list[object]:
        events, self._events = self._events, []
        return events

    async def request_stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> None:
        await self._stop.wait()


class Channel:
    """Handle of a channel, which may be sent to any process of the Ray job that made it.

    Events are frozen dataclasses. The tasks define them and the observers of a run tell them apart by their class.
    """

    def __init__(self) -> None:
        # When its process dies, the actor is restarted and calls are repeated. Its events are lost, but not the run.
        options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1, "max_task_retries": -1}
        self._mailbox: Any = ray.remote(_Mailbox).options(**options).remote()

    def report(self, event: object) -> None:
        """Sends an event to the driver; returns at once."""
        self._mailbox.put.remote(event)

    def take(self) -> list[object]:
        """The events since the last call, in the order in which they arrived."""
        return ray.get(self._mailbox.take.remote())

    def request_stop(self) -> None:
        """Asks all listeners to end with a checkpoint."""
        ray.get(self._mailbox.request_stop.remote())

    def on_stop(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, on a thread of its own in this process, when a stop is requested."""

        def wait() -> None:
            try:
                ray.get(self._mailbox.wait_for_stop.remote())
            except ray.exceptions.RayError:
                return  # the driver and its channel are gone, or this process is leaving the cluster
            listener()

        threading.Thread(target=wait, daemon=True, name="stop-listener").start()
