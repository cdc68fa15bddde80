"""The options of `reglue list`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from reglue.files import TakesPaths


@dataclass(frozen=True)
class ListRuns(TakesPaths):
    """List the runs, stores and autoencoders below a folder: recipe, steps, loss, newest figure and size of each."""

    folder: Positional[Path] = Path()
    """Where to look, at any depth. Default: here."""
    sort: Literal["name", "time", "steps", "loss", "size"] = "name"
    """Order of the lines: by name, or the newest, longest trained, best or largest first."""

    written = ""  # The table is all.
