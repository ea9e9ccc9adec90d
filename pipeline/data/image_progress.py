"""How far a task has come that works through all images. Imports no Ray: the driver's display knows this class."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_SECONDS = 1.0
"""Least time between two reports."""


@dataclass(frozen=True)
class ImageProgress:
    """The position within a step of a task.

    Attributes:
        task: Name of the task.
        step: What was done with the images, such as `decoded` or `written`.
        images: Images that are done.
        total: All images.
        image_bytes: Bytes of the pixels of an image.
        images_per_second: Since the step began.
        seconds_left: Estimated time until the step ends.
    """

    task: str
    step: str
    images: int
    total: int
    image_bytes: int
    images_per_second: float
    seconds_left: float


Report = Callable[[object], None]
"""Shows an event to the person who waits."""


class ImageCounter:
    """Reports the progress of a step at most once a second.

    Args:
        task: Name of the task.
        step: See `ImageProgress`.
        total: All images.
        image_bytes: Bytes of the pixels of an image.
        report: Gets the `ImageProgress`.
    """

    def __init__(self, task: str, step: str, total: int, image_bytes: int, report: Report) -> None:
        self._task, self._step, self._total, self._image_bytes = task, step, total, image_bytes
        self._report, self._done = report, 0
        self._start = self._reported = time.monotonic()

    def add(self, images: int) -> None:
        """Counts images that are done."""
        self._done += images
        now = time.monotonic()
        if not self._done or now - self._reported < _SECONDS:
            return
        self._reported = now
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate
        self._report(ImageProgress(self._task, self._step, self._done, self._total, self._image_bytes, rate, left))
