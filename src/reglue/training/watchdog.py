"""What keeps processes from waiting for one that has died: each watches the next, and all end within seconds."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

import torch
import torch.distributed as dist

from reglue.errors import Stopped
from reglue.training.distributed import DEVICE_ERRORS, LONG_WAIT, RunsOn, join, private_group

_T = TypeVar("_T")
_Options = TypeVar("_Options", bound=RunsOn)


def watchdog(command: Callable[[_Options], _T]) -> Callable[[_Options], _T]:
    """The command, whose processes join first; when one of them dies, the others end within seconds.

    They say so in one line and exit with code 2, whatever they are waiting for at that moment (NCCL would not notice
    for STEP_WAIT). Each process watches the next one over a connection of its own, and all leave together. An
    exception that leaves the command must end the process; `Stopped` must leave it in all of them.
    """

    @wraps(command)
    def watched(options: _Options) -> _T:
        with _watched(options.device):
            return command(options)

    return watched


@contextmanager
def _watched(device: str) -> Iterator[None]:
    rank, count = join(device)
    if count == 1:
        yield
        return
    after, before = (rank + 1) % count, (rank - 1) % count
    group = private_group(LONG_WAIT)
    leaving = threading.Event()

    def watch() -> None:
        try:
            dist.recv(torch.empty(1), after, group)  # its goodbye
        except RuntimeError:
            if not leaving.is_set():
                message = f"process {rank} ends, because process {after} has; see which one ended first, and why"
                print(f"\nreglue: {message}; the same command continues", file=sys.stderr, flush=True)
                os._exit(2)  # The main thread may be inside a message that never ends.

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    stopped: Stopped | None = None
    try:
        try:
            yield
        except Stopped as request:
            stopped = request
        dist.send(torch.ones(1), before, group)
        watcher.join()
    except DEVICE_ERRORS:
        raise
    except RuntimeError:
        # A message that failed may have noticed before the watcher did.
        watcher.join(5)
        raise
    finally:
        leaving.set()
    if stopped:
        raise stopped
