"""The options of `reglue prototypes`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.errors import require
from reglue.files import TakesPaths
from reglue.options import ready


@dataclass(frozen=True)
class MakePrototypes(TakesPaths):
    """Make prototypes for `reglue edit --paint`: the mean code of each class of masks, over a store's images."""

    store: Positional[Path]
    """The store that the run was trained on, or another one with codes of its compressor."""
    masks: Path
    """Folder of masks, palette or greyscale PNG files of class numbers (255 is ignored) with the names of the
    images. Images without one are left out."""
    out: Path
    """Folder of the prototypes: new or empty."""
    column: str | None = None
    """The codes: local.NAME of compressor NAME. Default: the only ones."""
    looks: int = 1
    """Prototypes of each class: the centres of so many clusters of its codes, the largest first."""
    seed: int = 0
    """Of the clusters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "looks", at_least=1)
        require(self, "seed", at_least=0)

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        painting = ("--paint", "LABELS.png", "--prototypes", self.out)
        return ready(self.out, "edit", "RUN", "IMAGE", *painting, "--out", "edits")
