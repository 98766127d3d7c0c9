"""SIGINT, SIGTERM and SIGHUP: the signals with which terminals, batch systems and launchers stop a process.

The first signal raises `Stopped` wherever the program is; every file is written completely or not at all. Within
`deferred` the signal waits, so that a training loop can finish its step and write a checkpoint. A second signal ends
the process at once. Terminals and launchers signal a whole group of processes, whose members pass the signal on: a
signal that comes within a second of the first counts as the same one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_WITHIN = 1.0  # seconds
HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception, so no handler of errors catches it."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}{where}")
        self.signum = signum


class _State:
    """The signal state of the process; there is only one."""

    pending = 0  # the signal that waits for the end of a deferred block
    since: float | None = None  # when the first signal came
    depth = 0  # of deferred blocks


def pending() -> int:
    """The signal that is waiting for the end of a deferred block; 0 if there is none."""
    return _State.pending


@contextmanager
def handled() -> Iterator[None]:
    """Signals raise `Stopped` within the block. Ignored signals stay ignored (nohup ignores SIGHUP). Outside the main
    thread nothing changes, because Python handles signals only there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.pending, _State.since = 0, None
    before = {number: signal.getsignal(number) for number in HANDLED}
    taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in taken:
            signal.signal(number, _receive)
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes within the block is raised at its end; `pending` returns it before."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.pending and not _State.depth:
        raise Stopped(_State.pending)


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.since is not None and now - _State.since < SAME_WITHIN:
        return
    _State.since = _State.since or now
    if _State.pending:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _State.depth:
        _State.pending = number
    else:
        raise Stopped(number)
