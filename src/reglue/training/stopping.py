"""Signals: Ctrl-C (SIGINT) ends a command at any moment, with exit code 130, SIGTERM with 143; SIGUSR1 asks for a line.

Nothing here takes time to import: `listen` comes before everything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NoReturn

REQUESTS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
STATE = getattr(signal, "SIGUSR1", None)
"""Asks what the process is doing. Windows has none."""
PATIENCE = 10.0
"""Seconds within which an interrupted command ends, whatever its main thread waits for."""

_asked = 0
"""The number of the last signal; 0 if there was none."""
_interrupted = _at_work = False
_deferred = threading.Event()
_tell: Callable[[], object] = partial(os.write, 2, b"reglue: begun\n")


def listen() -> None:
    """Have Ctrl-C and SIGTERM end this process in one line: at once, but for what is done inside `at_work`.

    Signals that are ignored stay so, as for a command that a script runs in the background. A file that grows over the
    limit (SIGXFSZ) raises OSError.
    """
    for number in REQUESTS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if STATE and signal.getsignal(STATE) is not signal.SIG_IGN:
        signal.signal(STATE, lambda *_: None)  # `_watch` answers, whatever this thread is in the middle of.
        signal.siginterrupt(STATE, False)
    if hasattr(signal, "SIGXFSZ"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = sys.unraisablehook

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if _interrupted:  # It came where Python cannot raise, in a destructor for example.
            end(_asked)
        before(what)

    sys.unraisablehook = unraisable
    arrived, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(arrived,), daemon=True).start()
    os.register_at_fork(after_in_child=_leave_to_parent)


def answers(tell: Callable[[], object]) -> None:
    """From now on, whoever sends SIGUSR1 is told by this function, in a thread of its own."""
    global _tell
    _tell = tell


@contextmanager
def at_work() -> Iterator[None]:
    """Inside, there may be something to tidy up: a signal raises KeyboardInterrupt, and does not end the process."""
    global _at_work
    _at_work = True
    try:
        yield
    finally:
        _at_work = False


@contextmanager
def deferred() -> Iterator[None]:
    """Around work that looks at `requested` in time: SIGTERM and Ctrl-C (SIGINT) do not end the process at once.

    A second Ctrl-C does. In threads other than the main one, which Python does not let handle signals, nothing changes.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, _: object) -> None:
        global _asked, _interrupted
        if _asked and number == signal.SIGINT:
            _asked, _interrupted = number, True
            _deferred.clear()
            raise KeyboardInterrupt
        # Not by print: the signal may have come in the middle of one.
        how = b"; Ctrl-C again stops at once, without one" if number == signal.SIGINT else b" after this step"
        os.write(2, b"\nreglue: stops with a checkpoint" + how + b"\n")
        _asked = number

    _asked = 0
    _deferred.set()
    before = {number: signal.signal(number, request) for number in REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _deferred.clear()


def requested() -> bool:
    """Whether SIGTERM or SIGINT has come to this process. It may not have come to the others."""
    return _deferred.is_set() and _asked > 0


def interrupted() -> bool:
    """Whether a signal has interrupted what this process did, whichever exception that has become."""
    return _interrupted


def exit_code() -> int:
    """Of a process that was asked to stop; that of SIGTERM where another process of the group was."""
    return 128 + (_asked or signal.SIGTERM)


def line() -> str:
    """What an interrupted process says."""
    how = REQUESTS[signal.Signals(_asked or signal.SIGINT)]
    return f"{how}; run the same command again, which keeps what was finished"


def end(number: int) -> NoReturn:
    """End the process in one line, now."""
    with suppress(OSError):
        os.write(2, f"reglue: {line()}\n".encode())
    os._exit(128 + number)


def _interrupt(number: int, _: object) -> NoReturn:
    global _asked, _interrupted
    _asked = number
    if not _at_work:
        end(number)
    _interrupted = True
    raise KeyboardInterrupt


def _watch(arrived: int) -> None:
    """Answer, and end the process soon after a signal, even if its main thread is in a call that does not return."""
    while True:
        (number,) = os.read(arrived, 1)
        if number == STATE:
            threading.Thread(target=_tell, daemon=True).start()
        if number in REQUESTS and not _deferred.is_set():
            time.sleep(PATIENCE)
            end(number)


def _leave_to_parent() -> None:
    """In a process that decodes for this one: Ctrl-C reaches both, and who started it ends it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if STATE:
        signal.signal(STATE, signal.SIG_IGN)
