"""The options of `reglue export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.files import TakesPaths


@dataclass(frozen=True)
class ExportRun(TakesPaths):
    """Write a run's weights under the names, and in the time convention, of SiT's, REPA's, ReDi's, REG's or REGLUE's
    code."""

    run: Positional[Path]
    """Folder of the run, or OWNER/NAME of one on the Hugging Face hub."""
    out: Path
    """File to write. A .safetensors file holds the averaged weights, with step and path in its metadata; a .pt or .pth
    file holds {ema, model, args, steps}, as the published code reads it. Published samplers take the path as an
    option."""
    step: int | None = None
    """Checkpoint to export; the last one if not given."""

    written = ""  # The command itself says what is in the file.
