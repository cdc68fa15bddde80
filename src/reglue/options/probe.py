"""The options of `reglue probe`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from reglue.errors import UserError, require
from reglue.files import TakesPaths

REPORT, TABLE, FIGURE = "report.json", "report.md", "figure.png"

LEAST_IMAGES = 4
"""Two to fit a probe to, one to choose its regularisation by and one to measure it on."""


@dataclass(frozen=True)
class ProbingOptions(TakesPaths):
    """What `reglue probe` and `reglue head` have in common: the images that they are fitted to, and how."""

    store: Positional[Path]
    """A store with features."""
    out: Path
    """Folder of the results: new, empty, or left over from the same `reglue probe`."""
    masks: Path | None = None
    """Predict the class of every pixel: folder of masks, palette or greyscale PNG files of class numbers (255 is
    ignored) with the names of the images. Images without one are left out."""
    images: int | None = None
    """Use so many images of each store, drawn at random. Default: all, but for the mirror images of --flips."""
    held_out: float = 0.2
    """Share of the images to measure on, which nothing is fitted to."""
    selection: float = 0.2
    """Share of the other images that choose the regularisation."""
    steps: int = 1000
    """Of the training of probes of maps, which may stop early, at a tenth of them."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Of Adam, at the start; it falls to 0 along a cosine."""
    seed: int = 0
    """Of the choice of images, of weights and of the order of images."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "steps", "batch_size", at_least=1)
        require(self, "held_out", "selection", more_than=0, less_than=1)
        require(self, "images", at_least=LEAST_IMAGES)
        require(self, "seed", at_least=0)
        require(self, "learning_rate", more_than=0)


@dataclass(frozen=True)
class Probe(ProbingOptions):
    """Fit small probes that predict classes, or masks, from what a store holds: how much does compression keep?

    The same command again continues where an interrupted one stopped, and adds what the store has gained.
    """

    validation: Path | None = None
    """A second store of the same kind to measure on; its codes are computed where it has none. Default: a share of the
    first (--held-out)."""
    validation_masks: Path | None = None
    """Masks of the second store. Default: the folder --masks."""
    columns: tuple[str, ...] | None = None
    """What to probe: features, features.last (the last layer), local.NAME, cls, cls.NAME, latent. Default: all."""
    conv: bool = True
    """Fit the small convolutional probe too."""
    hidden: int = 64
    """Channels of the convolutional probe."""
    flat_limit: int = 4096
    """A linear probe sees every value of an input by itself where there are no more than this. Memory grows as the
    square: 4096 takes 1 GB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hidden", at_least=1)
        require(self, "flat_limit", at_least=0)
        if self.validation_masks is not None and (self.masks is None or self.validation is None):
            raise UserError("--validation-masks belongs to --masks and --validation; give these too")

    def decisive(self) -> dict[str, Any]:
        """The options that decide every result, as JSON has them."""
        without = {"store", "out", "validation", "masks", "validation_masks", "columns", "conv", "flat_limit", "device"}
        return {option: value for option, value in asdict(self).items() if option not in without}

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"the report is in {self.out}"
