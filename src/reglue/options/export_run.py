"""The options of `reglue export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.errors import UserError, require
from reglue.files import TakesPaths
from reglue.names import Weights


@dataclass(frozen=True)
class ExportRun(TakesPaths):
    """Write a run's weights under the names, and in the time convention, of SiT's, REPA's, ReDi's, REG's or REGLUE's
    code."""

    run: Positional[Path]
    """Folder of the run, or OWNER/NAME of one on the Hugging Face hub."""
    out: Path
    """File to write. A .safetensors file holds the weights; a .pt or .pth file {ema, model, args, steps}, as the
    published code reads it. Published samplers take the path as an option. For `reglue import` the run's record goes
    with them, in the metadata or the args: it names the classes, and the autoencoder with its folder."""
    step: int | None = None
    """Checkpoint to export; the last one if not given."""
    weights: Weights = "ema"
    """What a .safetensors file holds: the averaged weights (ema) or the trained ones (model)."""

    written = ""  # The command itself says what is in the file.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "step", at_least=0)
        if self.weights != "ema" and self.out.suffix != ".safetensors":
            raise UserError(f"--weights {self.weights} is for .safetensors files, since others hold both; leave it out")
