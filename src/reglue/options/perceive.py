"""The options of `reglue perceive`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from reglue.errors import UserError
from reglue.names import Estimator
from reglue.sampling import Draw

REPORT, PICTURE, IMAGES, MAPS = "perception.json", "picture.png", "images", "maps"

OF_IMAGES_TOO = frozenset(("run", "out", "count", "seed", "autoencoder", "batch_size", "device"))
"""Options of `Draw` that mean something where images are encoded; all others are about drawing."""


@dataclass(frozen=True)
class Perceive(Draw):
    """Draw images from a run and predict what they show from their latents, with heads that `reglue head` trained.

    The same heads look at the decoded images through the vision encoder; the report shows how far the two agree.
    """

    out: Path
    """Folder of the results (picture.png, perception.json, images, maps): new or empty."""
    head: tuple[Path, ...] = field(kw_only=True)
    """Heads: folders made by `reglue head`, or DINOv2's published linear heads."""
    images: Path | None = None
    """Encode the images of this folder (or anything that `reglue prepare` takes) in place of drawing: a control that
    separates the generator's errors from those of the features. RUN may then be an autoencoder that `reglue autoencode`
    trained. Options for drawing are refused, unless --from drawn is given."""
    sources: Annotated[tuple[Estimator, ...], tyro.conf.arg(name="from")] = ()
    """Where features come from without the image: alignment (the alignment network of the run's autoencoder, on
    latents), local (the decoder of the run's compressor, on the local map) or, with --images, drawn (the same on the
    local map that a run of --times independent draws given the latents: what it sees in them). Default: what the run
    has and the heads can read."""
    encoder: str | None = None
    """The vision encoder, if it has moved: as for `reglue prepare`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_drawing = (part for part in fields(Draw) if part.name not in OF_IMAGES_TOO)
        given = next((part.name for part in of_drawing if getattr(self, part.name) != part.default), None)
        if self.images is not None and given and "drawn" not in self.sources:
            option = f"--{given.replace('_', '-')}"
            raise UserError(f"{option} is about drawing, and with --images nothing is drawn; leave either out")

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"pictures and report are in {self.out}"
