"""Progress: a bar on a terminal, and in a log a line every half minute."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between lines in a log."""
LINE = "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Bar(tqdm):
    """tqdm's bar, with the same arguments; where its output is no terminal, lines for whatever takes half a minute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._begun, self._said, self._shown = time.monotonic(), time.monotonic(), 0
        super().__init__(*args, **kwargs)

    @property
    def _on_terminal(self) -> bool:
        return self.fp.isatty() or "ipykernel" in sys.modules

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or write a line if it is time to."""
        if self._on_terminal:
            return super().display(msg, pos)
        if time.monotonic() - self._said >= EVERY:
            self._said, self._shown = time.monotonic(), self.n
            self.fp.write(self.format_meter(**{**self.format_dict, "bar_format": LINE}) + "\n")
            self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Take the bar off the terminal for a moment."""
        if self._on_terminal:
            super().clear(nolock)

    def close(self) -> None:
        """End, with a last bar or line if it is to stay."""
        if not self.disable and not self._on_terminal:
            if self.leave and self.n > self._shown and time.monotonic() - self._begun >= EVERY:
                self._said = -EVERY  # whenever the last line was
                self.display()
            self.delay = float("inf")  # tqdm takes it for one that has never been shown.
        super().close()
