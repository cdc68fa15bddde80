"""The options of `reglue demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reglue.errors import require
from reglue.files import TakesPaths


@dataclass(frozen=True)
class Demo(TakesPaths):
    """Prepare, compress, train, sample and evaluate on real handwritten digits, and write a report page."""

    out: Path = Path("demo-output")
    """Folder for everything; the same command again continues in it."""
    compare: bool = False
    """Also train plain SiT for as many steps, and show both."""
    samples_per_class: int = 100
    """Images of each digit, guided and unguided each, that the figures are of. The page shows the first 20."""
    steps: int = 3000
    """Training steps."""
    seed: int = 0
    """Seed of the held-out digits, the training and the samples."""

    written = ""  # The last line of output is JSON.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "samples_per_class", "steps", at_least=1)
        require(self, "seed", at_least=0)
