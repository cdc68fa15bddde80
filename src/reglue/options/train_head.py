"""The options of `reglue head`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reglue.errors import UserError, require
from reglue.options import ready
from reglue.options.probe import ProbingOptions


@dataclass(frozen=True)
class TrainHead(ProbingOptions):
    """Train a head for `reglue perceive`: it predicts from an encoder's features what every pixel shows.

    With --masks it segments, with --depth it predicts depth; with neither it maps the classes of the store's images, by
    a linear classifier of the mean over patches that is then applied to every patch. Steps, batch size and learning
    rate are those of a head for --masks.
    """

    depth: Path | None = None
    """Folder of depth maps, greyscale PNG files of 8 or 16 bits or NPY arrays, with the names of the images; 0 is
    unknown. The head predicts depth in their unit."""
    class_names: tuple[str, ...] = ()
    """Names of the masks' classes, from 0. Default: their numbers; those of the store's classes without --masks."""
    layers: Literal["last", "all"] = "last"
    """Layers of the store's features to read: the last, which is what an autoencoder's alignment network gives of
    latents, or all, which a REGLUE compressor gives of local maps."""
    hidden: int = 0
    """With --masks: channels of two convolutions before the last; 0 makes the head linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hidden", at_least=0)
        if self.masks is not None and self.depth is not None:
            raise UserError("--masks and --depth: a head predicts one of them; train two heads")
        if self.masks is None and (self.hidden or self.class_names):
            raise UserError("--hidden and --class-names belong to --masks; give it too, or leave them out")

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return ready(self.out, "perceive", "RUN", "--head", self.out, "--out", "seen")
