"""Lets the driver of a run on a cluster go on when its terminal is gone."""

import os
import signal
import stat
import tempfile
import threading
from collections.abc import Callable

from pipeline.driver.progress import Progress


def outlive_terminal(progress: Progress) -> Callable[[], None]:
    """Lets this process go on when the ssh connection of its terminal ends; its output then goes to a file.

    What the person has sent to a file stays there, and so does all that `nohup` was given. In another thread than the
    main one nothing is done, because Python lets only that one handle signals.

    Returns:
        A function after which the process ends with its terminal again, unless that is gone already.
    """
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        return lambda: None

    def hang_up(*_: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        streams = [stream for stream in (1, 2) if not stat.S_ISREG(os.fstat(stream).st_mode)]
        if not streams:
            return
        try:
            # In a folder to which others may write: a new file, which is no link, and which they cannot read.
            file, _path = tempfile.mkstemp(prefix=f"perceiver-pipeline-{os.getpid()}-", suffix=".log")
        except OSError:
            file = os.open(os.devnull, os.O_WRONLY)  # the run goes on without its output
        for stream in streams:
            os.dup2(file, stream)
        progress.hang_up()

    def undo() -> None:
        if signal.getsignal(signal.SIGHUP) is hang_up:
            signal.signal(signal.SIGHUP, before)

    signal.signal(signal.SIGHUP, hang_up)
    return undo
