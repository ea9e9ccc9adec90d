"""The channel between a driver and its tasks."""

import os
import signal
import threading
import time

import pytest
import ray
from workshop import PATIENCE

from pipeline.workflow.channel import Channel


@pytest.mark.usefixtures("ray_cluster")
def test_the_channel_outlives_its_process() -> None:
    channel, stopped, events = Channel(), threading.Event(), []
    channel.on_stop(stopped.set)
    os.kill(ray.get(channel._mailbox.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    channel.report({"number": 1})
    deadline = time.monotonic() + PATIENCE
    while not (events := channel.take()):
        assert time.monotonic() < deadline
    assert events == [{"number": 1}]
    channel.request_stop()
    assert stopped.wait(PATIENCE)
