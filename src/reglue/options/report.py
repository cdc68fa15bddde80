"""The options of `reglue report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.errors import UserError, option, require
from reglue.files import TakesPaths


@dataclass(frozen=True)
class Report(TakesPaths):
    """Write one page about a run, or about several beside each other: samples, losses, figures, where it came from.

    Everything is inside the file, which loads nothing. Images are drawn for it: the same seeds in every run.
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, OWNER/NAME of some on the Hugging Face hub, starter or flowers of this package."""
    out: Path = Path("report.html")
    """The page."""
    samples_per_class: int = 8
    """Images to draw of each class; 0 draws none."""
    classes: tuple[str, ...] = ()
    """Classes to draw, by number or name. Default: the first ten."""
    steps: int | None = None
    """Sampling steps. Default: those of each run's recipe, but 50 at most."""
    guidance_scale: float | None = None
    """Classifier-free guidance of all runs. Default: that of each run's recipe."""
    seed: int = 0
    """Image i depends on the seed and i alone."""
    store: Path | None = None
    """The training store, if it has moved: for the nearest training images and the semantics of real ones."""
    batch_size: int = 32
    """Images per batch."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "samples_per_class", "guidance_scale", at_least=0)
        require(self, "seed", at_least=0)
        require(self, "steps", "batch_size", at_least=1)
        if not self.runs:
            raise UserError("no run given; name one, or several to compare")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{option('out')} {self.out}: name a page that ends in .html")

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"{self.out} is ready: open it in a browser"
