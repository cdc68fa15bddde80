"""Progress: a bar on a terminal or in a notebook, and in a log a line every half minute; or nothing, if asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOBase
from typing import Any
from weakref import WeakSet

from tqdm.auto import tqdm

EVERY = 30.0
"""Seconds between lines in a log."""
LINE = "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
"""Whether bars are widgets. Importing tqdm's own class, to ask it, takes a second."""
_quiet = False
_stages: list[str] = []


class _Nowhere(TextIOBase):
    """Where bars write that nobody is to see: they still know how far the work is."""

    def write(self, text: str, /) -> int:
        """Nothing."""
        return len(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, no progress is shown. Warnings and results are."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether nobody wants to see more than results."""
    return _quiet


@contextmanager
def stage(name: str, announced: bool = False) -> Iterator[None]:
    """Inside, bars say that they belong to a stage of the work, `prepare`. First a line says so, if asked."""
    if announced and not _quiet:
        Bar.write(f"── {name}")
    _stages.append(name)
    try:
        yield
    finally:
        _stages.pop()


class Bar(tqdm):
    """tqdm's bar, with the same arguments; where its output is no terminal, lines for whatever takes half a minute.

    `aside` gives what `state` says beside it.
    """

    def __init__(self, *args: Any, aside: Callable[[], str] | None = None, **kwargs: Any) -> None:
        self._begun, self._said, self._shown = time.monotonic(), time.monotonic(), 0
        self.aside = aside
        kwargs["desc"] = _in_stage(kwargs.get("desc") or "")
        unseen = kwargs.get("disable", False) or _quiet
        kwargs["disable"] = unseen and _IN_NOTEBOOK  # There, it would be a widget.
        if unseen:
            kwargs["file"] = _Nowhere()
        super().__init__(*args, **kwargs)
        if not self.disable:
            _open.add(self)

    @property
    def _in_log(self) -> bool:
        # A notebook without widgets gets the terminal's bar.
        return not (_IN_NOTEBOOK or self.fp.isatty() or "ipykernel" in sys.modules)

    def display(self, msg: str | None = None, pos: int | None = None, **how: Any) -> Any:
        """Draw the bar, or write a line if it is time to."""
        if not self._in_log:
            return super().display(msg, pos, **how)
        if time.monotonic() - self._said >= EVERY:
            self._said, self._shown = time.monotonic(), self.n
            self.fp.write(self.line() + "\n")
            self.fp.flush()
        return True

    def line(self) -> str:
        """How far it is, as logs have it."""
        return self.format_meter(**{**self.format_dict, "bar_format": LINE})

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Take the bar off the terminal for a moment."""
        if not self._in_log:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        """End, with a last bar or line if it is to stay."""
        _open.discard(self)
        if not self.disable and self._in_log:
            if self.leave and self.n > self._shown and time.monotonic() - self._begun >= EVERY:
                self._said = -EVERY  # whenever the last line was
                self.display()
            self.delay = float("inf")  # tqdm takes it for one that has never been shown.
        super().close()


_open = WeakSet[Bar]()


def state() -> str:
    """What is going on, in one line: every bar that is open, from the outermost in; without one, the stage."""
    told = list[str]()
    for bar in sorted(_open, key=lambda bar: bar._begun):
        told += [bar.line(), *([bar.aside()] if bar.aside else [])]
    return ", ".join(told or [f"{' '.join(_stages)}: begun"])


def _in_stage(what: str) -> str:
    """A bar's description with the stage in front, unless it begins with the same word."""
    stage = _stages[-1] if _stages else ""
    if not stage or what.split()[:1] == stage.split()[:1]:
        return what or stage
    return f"{stage}: {what}" if what else stage
