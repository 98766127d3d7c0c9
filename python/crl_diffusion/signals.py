"""SIGINT, SIGTERM and SIGHUP: the signals with which terminals, batch systems and launchers stop a process.

The first signal raises `Stopped` wherever the program is; every file is written completely or not at all. Within
`deferred` the signal waits, so that a training loop can finish its step and write a checkpoint. A second signal ends
the process at once. Terminals and launchers signal a whole group of processes, whose members pass the signal on: a
signal that comes within a second of the first counts as the same one.

`compare` may be killed by a signal that it cannot handle. So its runs wait for its end, too: see `end_with_compare`.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SAME_WITHIN = 1.0  # seconds
AGAIN_AFTER = 0.01  # seconds
IMPORT = "<frozen importlib._bootstrap>"  # the file that an import's frames name
OF_COMPARE = "CRL_DIFFUSION_OF_COMPARE"  # the variable that marks the processes that `compare` starts
HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. Not an Exception, so no handler of errors catches it; Python itself, when it
    compiles a module, drops all exceptions but KeyboardInterrupt."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}{where}")
        self.signum = signum


class _State:
    """The signal state of the process; there is only one."""

    pending = 0  # the signal that waits for the end of a deferred block
    since: float | None = None  # when the first signal came
    depth = 0  # of deferred blocks
    say: Callable[[Stopped], None] | None = None  # of `handled`
    of_compare = False  # whether `compare` has started this process


def pending() -> int:
    """The signal that is waiting for the end of a deferred block; 0 if there is none."""
    return _State.pending


@contextmanager
def handled(say: Callable[[Stopped], None] | None = None) -> Iterator[None]:
    """Signals raise `Stopped` within the block. Ignored signals stay ignored (nohup ignores SIGHUP). Outside the main
    thread nothing changes, because Python handles signals only there.

    With `say`, a signal during an import ends the process at once, after `say`: C++ code of torch aborts the process
    where its import is interrupted by an exception, and other code makes another error of it, or drops it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.pending, _State.since, _State.say = 0, None, say
    before = {number: signal.getsignal(number) for number in HANDLED}
    taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    drop = sys.unraisablehook

    def raise_again(unraisable: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised in a destructor or a callback: the signal comes again."""
        if isinstance(unraisable.exc_value, Stopped):
            _State.since = None
            threading.Timer(AGAIN_AFTER, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
        else:
            drop(unraisable)

    sys.unraisablehook = raise_again
    try:
        for number in taken:
            signal.signal(number, _receive)
        yield
    except Exception as error:
        if (stop := _cause(error)) is not None:
            raise stop from error
        raise
    finally:
        sys.unraisablehook = drop
        _State.say = None
        for number, handler in taken.items():
            signal.signal(number, handler)


def _cause(error: BaseException) -> Stopped | None:
    """The `Stopped` of which other code has made this error, or during which the error came."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, Stopped):
        seen = seen.__cause__ or seen.__context__
    return seen


def end_with_compare() -> None:
    """Let this process get SIGTERM when the `compare` that has started it ends, however that ends; nothing if none has.
    Stdin is then a pipe: `compare` holds its other end and writes nothing, so a read returns when `compare` has ended.
    """
    _State.of_compare = os.environ.pop(OF_COMPARE, "") != "" and stat.S_ISFIFO(os.fstat(0).st_mode)
    if not _State.of_compare:
        return
    pipe = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        if hasattr(signal, "pthread_sigmask"):  # all signals are for the main thread, which they wake
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def of_compare() -> bool:
    """Whether `compare` has started this process."""
    return _State.of_compare


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
    elif _State.say is not None and _imports(frame):
        try:
            _State.say(Stopped(number))
        finally:
            os._exit(128 + number)
    else:
        raise Stopped(number)


def _imports(frame: FrameType | None) -> bool:
    """Whether code runs within an import."""
    while frame is not None and frame.f_code.co_filename != IMPORT:
        frame = frame.f_back
    return frame is not None
