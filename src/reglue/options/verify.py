"""The options of `reglue verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.files import TakesPaths


@dataclass(frozen=True)
class Verify(TakesPaths):
    """Read every file of a folder, after copying it for example, and compare it with the hash of what was written.

    Of a run, its training store is verified too if it is still where it was.
    """

    folder: Positional[Path]
    """A store, run, autoencoder, head or samples (folder or .npz file), starter or flowers of this package."""

    written = ""  # The command itself says what it has found.
