"""What an edit of an image keeps and what it changes: every option of it is declared here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from reglue.diffusion.specs import LATENT
from reglue.errors import UserError, option, require
from reglue.files import TakesPaths
from reglue.sampling import Draw

SHEET = "edits.png"
"""The picture to look at in a folder of edits."""
LOCAL, CLASS_TOKEN = "local", "cls"
"""The modalities that some of these options are about."""
FEATURES = "features"
"""What is held beside modalities: hidden tokens that were aligned with a vision encoder's."""
OTHERS = {"local_from": LOCAL, "cls_from": CLASS_TOKEN, "features_from": FEATURES}
"""The options that name another image, and what they take of it as a whole."""
SEMANTICS = (*OTHERS, "paste", "paint")
"""The options that hold semantics of other images."""


@dataclass(frozen=True, kw_only=True)
class Editing(TakesPaths):
    """How images are edited. In Python an image may be given in place of the name of its file."""

    keep: tuple[str, ...] = ()
    """Hold these to the image's own: local (what is where), cls (the whole at a glance), latent (the pixels),
    features (what a model that was aligned with a vision encoder is to see, led to by gradients)."""
    until: float | Mapping[str, float] = 0.0
    """Hold semantics only while t ≥ this, then let go: 0 holds to the end, 0.3 to 0.7 gives realism for obedience. By
    modality: local 0.3 cls 0.6."""
    by: Literal["clamp", "loss"] = "clamp"
    """How all that is known is held: replaced in every step (clamp), or approached along the gradient of the squared
    error (loss), which costs two to three times as much."""
    mask: Path | None = None
    """A picture of the image's size: white is drawn anew, black stays."""
    feather: int = 0
    """Pixels around the white over which the drawn blends into the image; beyond them the image is untouched."""
    strength: float | None = None
    """Image to image: how far to go back to noise. 0 gives the image back, 1 ignores it."""
    local_from: Path | None = None
    """Take the local map of this image: what is where."""
    cls_from: Path | None = None
    """Take the class token of this image: the whole at a glance."""
    features_from: Path | None = None
    """Lead the model's hidden tokens to what the encoder sees in this image, for models trained with alignment. With
    --box, without --paste: to the mean of that part, everywhere."""
    paste: Path | None = None
    """Take a piece of this image's local map (--box) into the image's own (--at): the layout changes."""
    box: tuple[int, int, int, int] | None = None
    """The piece, LEFT TOP RIGHT BOTTOM in pixels of the image that --paste, or --features-from, names."""
    at: tuple[int, int] | None = None
    """Where its left upper corner goes, in pixels of the image."""
    mirror: bool = False
    """Mirror the piece."""
    scale: float = 1.0
    """Size of the piece, as a multiple of its own."""
    paint: Path | None = None
    """A painted map with the image's proportions: a palette or greyscale PNG of class numbers, 255 is free; for a head
    of depth, depths as for `reglue head --depth`, 0 is free."""
    prototypes: Path | None = None
    """What the classes of --paint look like: a folder that `reglue prototypes` made. Edit i has look i of each."""
    head: Path | None = None
    """In place of --prototypes: a head of `reglue head`, with --masks or --depth, on all layers, whose error leads to
    the painting."""
    loss_scale: float | None = None
    """How strongly --head, features and --by loss lead; 1 is the likelihood. Default: 10."""
    flow_edit: bool = False
    """Change the class (--classes) with little change of the rest (FlowEdit): from noise of --strength, 1 by default,
    with a deterministic sampler."""
    source_class: str | None = None
    """The class of the image, for --flow-edit. Default: none."""
    resample: int = 0
    """Go over every tenth of the steps so many times more, which harmonises seams."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "until", at_least=0, less_than=1)
        require(self, "loss_scale", more_than=0)
        require(self, "strength", at_least=0, at_most=1)
        require(self, "feather", "resample", "box", "at", at_least=0)
        require(self, "scale", more_than=0)
        if self.by not in ("clamp", "loss"):
            raise UserError(f"{option('by')} {self.by}: choose clamp or loss")
        self._refuse_contradictions()
        self._refuse_incomplete()

    def _refuse_contradictions(self) -> None:
        if self.flow_edit and (self.held or self.resample or self.by == "loss"):
            names = [name for name in ("keep", *SEMANTICS, "resample") if getattr(self, name)] or ["by"]
            raise UserError(f"{option('flow_edit')} has its own way from the image; leave {option(names[0])} out")
        for name in ("strength", "mask"):
            if LATENT in self.keep and getattr(self, name) is not None:
                raise UserError(
                    f"{option('keep')} {LATENT} holds every pixel, and {option(name)} draws them anew; leave one out"
                )
        for name, part in OTHERS.items():
            if part in self.keep and getattr(self, name) is not None:
                raise UserError(
                    f"{option('keep')} {part} takes the image's own, and {option(name)} another one's; leave one out"
                )

    def _refuse_incomplete(self) -> None:
        belongs = {"feather": "mask", "at": "paste", "mirror": "paste", "scale": "paste"}
        belongs |= {} if self.features_from else {"box": "paste"}
        belongs |= {"prototypes": "paint", "head": "paint"}
        defaults = {name: part.default for name, part in type(self).__dataclass_fields__.items()}
        for name, other in belongs.items():
            if getattr(self, name) != defaults[name] and getattr(self, other) is None:
                raise UserError(f"{option(name)} belongs to {option(other)}; give it too, or leave it out")
        if self.paint is not None and self.prototypes is None and self.head is None:
            raise UserError(f"{option('paint')} belongs to {option('prototypes')}; give it too, or {option('head')}")
        if self.prototypes is not None and self.head is not None:
            raise UserError(f"{option('prototypes')} and {option('head')} both say what is painted; leave one out")
        if self.by == "loss" and not (self.held or self.mask):
            raise UserError(f"{option('by')} loss: nothing is held that could be approached; leave it out")
        led = self.head is not None or FEATURES in self.held or self.by == "loss"
        if self.loss_scale is not None and not led:
            raise UserError(
                f"{option('loss_scale')} belongs to {option('head')}, {option('features_from')} and {option('by')} "
                "loss; leave it out"
            )
        if self.paste is not None and (self.box is None or self.at is None):
            missing = "box" if self.box is None else "at"
            raise UserError(f"{option('paste')} needs {option(missing)}; give it too")
        for name, count in (("box", 4), ("at", 2)):
            if (value := getattr(self, name)) is not None and len(value) != count:
                raise UserError(f"{option(name)} {' '.join(map(str, value))}: give {count} numbers")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            shown = " ".join(map(str, self.box))
            raise UserError(f"{option('box')} {shown}: choose left < right and top < bottom")
        if self.until and not self.held:
            raise UserError(f"{option('until')} {self.until}: nothing is held that could be let go; leave it out")
        if isinstance(self.until, Mapping) and (free := [name for name in self.until if name not in self.held]):
            raise UserError(f"{option('until')} {free[0]}: it is not held; what is, is {', '.join(self.held)}")
        if self.source_class is not None and not self.flow_edit:
            raise UserError(f"{option('source_class')} belongs to {option('flow_edit')}; give it too, or leave it out")
        if not (self.held or self.flow_edit or self.mask is not None or self.strength is not None):
            ways = ", ".join(map(option, ("keep", "mask", "strength", *SEMANTICS, "flow_edit")))
            raise UserError(f"nothing of the image would be left; choose what stays, by one of {ways}")

    @property
    def held(self) -> tuple[str, ...]:
        """The modalities that are held, as a whole or in a part that is painted."""
        return tuple(dict.fromkeys(name for name, _ in self.needs()))

    def needs(self) -> list[tuple[str, str]]:
        """The modalities that a model must have for this, and what asks for each."""
        named = {**OTHERS, "paste": LOCAL, "paint": LOCAL}
        kept = [(name, f"{option('keep')} {name}") for name in self.keep]
        return kept + [(part, option(name)) for name, part in named.items() if getattr(self, name) is not None]


@dataclass(frozen=True)
class DrawEdits(Draw, Editing):
    """Which images are edited by a run, and how: the sampling options that are not given are those of its recipe."""

    images: Positional[tuple[Path, ...]] = field(kw_only=True)
    """Images to edit: files, and folders of them."""
    out: Path
    """Folder of the results (a picture of each edit, edits.png to look at, edits.json): new, or begun so before."""
    count: int = 4
    """Edits of each image."""
    seed: int = 0
    """Edit i of image j depends on the seed, j and i alone."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: the classes in turn. random: drawn by seed, image and edit."""
    classes: tuple[str, ...] = ()
    """Draw as these classes, by number or name. Default: as none, unguided."""
    encoder: str | None = None
    """The run's vision encoder, if it has moved: as for `reglue prepare`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise UserError("no image to edit; name one")
