"""One writer for each folder and file: whoever comes second is told who is at work, before anything is touched."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from reglue.errors import UserError
from reglue.files import BESIDE, LOCK, parse_json, to_json

PARTING = 10.0
"""Seconds for which the children of a process that was killed may still hold its lock."""
_P = ParamSpec("_P")
_T = TypeVar("_T")
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: what is in its file."""

    process: int
    machine: str
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.machine} ({self.command}, since {self.since})"

    @staticmethod
    def of_this_process() -> Holder:
        """This process, from now on."""
        words = ["reglue" if sys.argv[0].endswith(("reglue", "__main__.py")) else sys.argv[0], *sys.argv[1:2]]
        return Holder(os.getpid(), socket.gethostname(), " ".join(words), time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def has_died(self) -> bool:
        """Whether it was a process of this machine that is no more."""
        if self.machine != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # It is another user's.
            return False
        return False


def writes(field: str = "out") -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Have a command hold the folder or file that a field of its options, its first argument, names while it runs.

    It then raises UserError as `writing` too.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            path = getattr(args[0] if args else kwargs["options"], field)
            with writing(path) if path else nullcontext():
                return function(*args, **kwargs)

        return alone

    return decorate


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, this process alone writes to a folder or file, and what a process that died left half-written is gone.

    Of several processes that work together (torchrun) the first one holds it for all. A lock ends with its process,
    however that ends. Raises UserError if another process holds it, or none can be made.
    """
    place = path.resolve()
    if place in _held.get() or os.environ.get("RANK", "0") != "0":
        yield
        return
    file = _lock_of(place)
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"cannot write to {path} ({reason}); choose another place") from error
    token = _held.set(_held.get() | {place})
    try:
        file.write_text(to_json(Holder.of_this_process()))
        sweep(place)
        yield
    finally:
        _held.reset(token)
        file.unlink(missing_ok=True)  # While it is held: whoever has opened it meanwhile sees that it is gone.
        lock.release()


def _lock_of(place: Path) -> Path:
    """Beside a folder; within one that has been made where nothing else may be, as containers have them."""
    if place.is_dir() and not os.access(place.parent, os.W_OK):
        return place / f"this{LOCK}"  # A name that is an ending alone has none itself.
    return place.with_name(place.name + LOCK)


def _acquire(lock: FileLock, path: Path) -> None:
    """Take the lock at once, or as soon as what a dead process has left behind lets go of it."""
    deadline = time.monotonic() + PARTING
    while True:
        try:
            return lock.acquire(timeout=0) and None
        except Timeout:
            holder = _holder(Path(lock.lock_file))
            if holder is None or not holder.has_died or time.monotonic() > deadline:
                who = holder or "another process"
                raise UserError(f"{who} is writing to {path}; wait until it ends, or choose another place") from None
            time.sleep(0.1)


def _holder(file: Path) -> Holder | None:
    """Who says that they hold a lock; None in the moment before they have said it."""
    with suppress(OSError, ValueError):
        return parse_json(file.read_bytes(), Holder)
    return None


def sweep(place: Path) -> None:
    """Remove what a process that died has left half-written of a folder or file. Its lock must be held.

    Folders that others hold (a `sample` into the folder of a run, say) are left alone.
    """
    _remove(place.with_name(place.name + BESIDE))
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name + LOCK not in files]
        for name in [*folders, *files]:
            if name.endswith(BESIDE) and name.removesuffix(BESIDE) + LOCK not in files:
                _remove(Path(folder, name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
