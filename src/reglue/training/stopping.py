"""Stopping on request: SIGTERM and Ctrl-C end a training after a step, with a checkpoint, and not in the middle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_requested = threading.Event()


@contextmanager
def deferred() -> Iterator[None]:
    """Around work that looks at `requested` in time: SIGTERM and Ctrl-C (SIGINT) do not end the process at once.

    A second Ctrl-C does. In threads other than the main one, which Python does not let handle signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        if _requested.is_set():
            raise KeyboardInterrupt
        _requested.set()
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nreglue: stops with a checkpoint; Ctrl-C again stops at once, without one\n")

    _requested.clear()
    handlers = {signal.SIGTERM: lambda *_: _requested.set(), signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested.clear()


def requested() -> bool:
    """Whether SIGTERM or SIGINT has come to this process. It may not have come to the others."""
    return _requested.is_set()
