"""The options of `reglue verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.files import TakesPaths


@dataclass(frozen=True)
class Verify(TakesPaths):
    """Compare every file of a store, after copying it for example, with the hash in the store's manifest.

    Of a run, the checkpoints are read, and its training store is verified if it is still where it was.
    """

    folder: Positional[Path]
    """A store or a run."""

    written = ""  # The command itself says what it has found.
